"""Captions, questions, statements, hypotheses: true, and no task can be solved by half of its input."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from vpworkbench.scenes.language import ATTRIBUTE_WORDS, RELATIONS, decide, parse
from vpworkbench.scenes.layout import scene_of
from vpworkbench.scenes.scene import COLOURS, COVERED, SHAPES, Scene, Thing
from vpworkbench.scenes.statements import TRUTHS_OF_LABEL, hypotheses, pair_statements
from vpworkbench.scenes.texts import LONGEST, captions, questions, ten_answers
from vpworkbench.settings.scenes import SceneSettings


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_scenes(difficulty: str, count: int, split: str = "train") -> list[Scene]:
    settings = SceneSettings(difficulty=difficulty, seed=2)
    return [scene_of(settings, split, i) for i in range(count)]


# What is said


@pytest.mark.parametrize("difficulty", ["easy", "medium", "hard"])
def test_captions_are_true_distinct_and_short(difficulty: str):
    forms: Counter = Counter()
    for seed, scene in enumerate(some_scenes(difficulty, 300)):
        texts = captions(scene, rng_of(seed))
        assert len(set(texts)) == 5
        for text in texts:
            words = text.split()
            assert decide(text, scene) is True, (text, scene)
            assert len(words) <= LONGEST
            assert ATTRIBUTE_WORDS.intersection(words)
            program = parse(text)
            assert any(phrase.colour for phrase in program.phrases)
            assert any(phrase.shape for phrase in program.phrases)
            forms[program.form] += 1
        assert texts == captions(scene, rng_of(seed))
    shares = {form: count / forms.total() for form, count in forms.items()}
    print(difficulty, {form: round(share, 3) for form, share in shares.items()})
    assert set(forms) == {"there", *RELATIONS}
    two_things = sum(shares[form] for form in RELATIONS if form != "between")
    assert 0.5 < two_things < 0.75


def test_the_vocabulary_is_small():
    spoken: set[str] = set()
    sample = some_scenes("medium", 200)
    for seed, scene in enumerate(sample):
        rng = rng_of(seed)
        spoken.update(*(text.split() for text in captions(scene, rng)))
        spoken.update(*(question.text.rstrip("?").split() for question in questions(scene, rng)))
        spoken.update(*(text.split() for text, _ in hypotheses(scene, "", rng)))
    for first in range(0, 200, 4):
        pairs = tuple(sample[first : first + 2]), tuple(sample[first + 2 : first + 4])
        spoken.update(*(text.split() for text in pair_statements(*pairs, rng_of(first)) or ()))
    assert 60 < len(spoken) < 90 and all(word.isalpha() and word.islower() for word in spoken)


def test_captions_of_other_images_are_rarely_true():
    for difficulty in ("easy", "hard"):
        sample = some_scenes(difficulty, 300)
        texts = [captions(scene, rng_of(seed)) for seed, scene in enumerate(sample)]
        truths = [
            decide(text, scene) for shift in (1, 7) for i, scene in enumerate(sample) for text in texts[i - shift]
        ]
        print(f"{difficulty}: captions of other images: {Counter(truths)}")
        assert 0 < truths.count(True) < 0.05 * len(truths)
        assert truths.count(False) > 0.9 * len(truths)


def naive_answer(text: str, scene: Scene) -> str | None:
    """Attribute and counting questions, by looking at the list of things."""
    words = text.rstrip("?").split()
    if words[:2] == ["how", "many"]:
        wanted = words[2 : words.index("are")]
        return str(sum(naive_fit(wanted, thing) for thing in scene.things))
    if words[0] == "what":
        found = [t for t in scene.things if naive_fit(words[4:], t)]
        return getattr(found[0], words[1]) if len(found) == 1 else None
    return None


def naive_fit(words: list[str], thing: Thing) -> bool:
    singular = {word: word for word in SHAPES} | {f"{s}{'es' * (s[-1] == 's') or 's'}": s for s in SHAPES}
    known = {thing.size, thing.material, thing.colour, thing.shape, "thing", "things"}
    return all(singular.get(word, word) in known for word in words)


def test_questions_are_answered_by_the_scene():
    kinds: Counter = Counter()
    for seed, scene in enumerate(some_scenes("medium", 200)):
        asked = questions(scene, rng_of(seed))
        assert 3 <= len(asked) <= 4 and asked == questions(scene, rng_of(seed))
        answers = [question.answer for question in asked]
        assert answers.count("yes") == answers.count("no") == 1
        for question in asked:
            kinds[question.kind] += 1
            assert question.text.startswith(question.kind) and question.text.endswith("?")
            expected = naive_answer(question.text, scene)
            if question.answer_type != "yes/no":
                assert question.answer == expected, (question, scene)
            elif question.text.startswith("is there"):
                statement = question.text.rstrip("?").replace("is there", "there is")
                assert decide(statement, scene) is (question.answer == "yes")
    assert len(kinds) >= 8


def test_ten_answers_agree_on_the_truth():
    disagreeing: Counter = Counter()
    for seed, scene in enumerate(some_scenes("easy", 60)):
        for question in questions(scene, rng_of(seed)):
            answers = ten_answers(question, rng_of(seed))
            given = Counter(answer["answer"] for answer in answers)
            assert given.most_common(1)[0][0] == question.answer
            disagreeing[10 - given[question.answer]] += 1
    assert set(disagreeing) == {0, 1, 2} and disagreeing[0] > disagreeing[1] > disagreeing[2]


def test_hypotheses_come_as_one_of_each_label():
    found = 0
    for seed, scene in enumerate(some_scenes("easy", 200)):
        caption = captions(scene, rng_of(seed))[0]
        told = hypotheses(scene, caption, rng_of(seed))
        labels = Counter(label for _, label in told)
        assert len({text for text, _ in told} - {caption}) == len(told)
        if not any(thing.covered for thing in scene.things):
            assert told == []
            continue
        assert len(set(labels.values())) == 1 and set(labels) == set(TRUTHS_OF_LABEL)
        found += len(told)
        for text, label in told:
            truth = {"entailment": True, "neutral": None, "contradiction": False}[label]
            assert decide(text, scene) is truth
    assert found > 200


# Balance: neither the text nor the image alone may solve a task


def facts(scene: Scene) -> np.ndarray:
    """What an image alone tells: how many of which colours and shapes, and the cloth's colour."""
    colours, shapes = list(COLOURS), (*SHAPES, COVERED)
    seen = np.zeros((2, len(colours) + 1, len(shapes) + 1))
    for thing in scene.things:
        c, s = colours.index(thing.colour), shapes.index(thing.shape)
        seen[0, c, -1] += 1
        seen[0, -1, s] += 1
        seen[1, c, -1] += thing.covered
        seen[1, -1, s] += thing.size == "large"
    return np.append(seen[:, :, -1].ravel(), [*seen[:, -1].ravel(), len(scene.things)])


Examples = list[tuple[str, np.ndarray, str]]  # text, facts of the image, label


@pytest.fixture(scope="module")
def tasks() -> dict[str, tuple[Examples, Examples]]:
    """For each task the examples to learn from and those to be judged by."""
    built: dict[str, tuple[Examples, Examples]] = defaultdict(lambda: ([], []))
    for part, split, count in ((0, "train", 2400), (1, "test", 2000)):
        sample = some_scenes("easy", count, split)
        for i, scene in enumerate(sample):
            rng, known = rng_of(i), facts(scene)
            for question in questions(scene, rng):
                example = (question.text, known, question.answer)
                built["questions"][part].append(example)
                built[f"questions: {question.kind}"][part].append(example)
                if question.answer_type == "yes/no":
                    built["questions: yes/no"][part].append(example)
            for text, label in hypotheses(scene, "", rng):
                built["hypotheses"][part].append((text, known, label))
        for i in range(0, count, 4):
            pairs = tuple(sample[i : i + 2]), tuple(sample[i + 2 : i + 4])
            for k, text in enumerate(pair_statements(*pairs, rng_of(i)) or ()):
                for pair in (0, 1):
                    known = np.concatenate([facts(scene) for scene in pairs[pair]])
                    built["statements"][part].append((text, known, str(k == pair)))
    return dict(built)


def text_only(learn: Examples, judge: Examples) -> float:
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
    model = LogisticRegression(C=0.1, max_iter=200)
    model.fit(words.fit_transform([text for text, _, _ in learn]), [label for *_, label in learn])
    return model.score(words.transform([text for text, _, _ in judge]), [label for *_, label in judge])


def image_only(learn: Examples, judge: Examples) -> float:
    model = RandomForestClassifier(50, min_samples_leaf=5, random_state=0)
    model.fit(np.array([known for _, known, _ in learn]), [label for *_, label in learn])
    return model.score(np.array([known for _, known, _ in judge]), [label for *_, label in judge])


@pytest.mark.parametrize("task, chance", [("questions: yes/no", 1 / 2), ("statements", 1 / 2), ("hypotheses", 1 / 3)])
def test_balanced_tasks_need_both_inputs(tasks, task: str, chance: float):
    learn, judge = tasks[task]
    assert len(learn) >= 2000 and len(judge) >= 1900
    text, image = text_only(learn, judge), image_only(learn, judge)
    print(f"{task}: text only {text:.3f}, image only {image:.3f}, chance {chance:.3f}")
    assert text <= chance + 0.05
    assert image <= chance + 0.05


def test_open_questions_hide_the_answer_from_the_text(tasks):
    """Chance is the most frequent answer of the question's type."""
    right = likely = total = 0.0
    for task, (learn, judge) in tasks.items():
        if task.startswith("questions: ") and task != "questions: yes/no":
            usual = Counter(label for *_, label in learn).most_common(1)[0][0]
            chance = np.mean([label == usual for *_, label in judge])
            text = text_only(learn, judge)
            print(f"{task}: text only {text:.3f}, chance {chance:.3f}, of {len(judge)}")
            right, likely = right + text * len(judge), likely + chance * len(judge)
            total += len(judge)
    print(f"all questions: text only {right / total:.3f}, chance {likely / total:.3f}")
    assert right / total <= likely / total + 0.05


def test_open_questions_hide_the_answer_from_the_image(tasks):
    learn, judge = tasks["questions"]
    usual = Counter(label for *_, label in learn).most_common(1)[0][0]
    chance = np.mean([label == usual for *_, label in judge])
    image = image_only(learn, judge)
    print(f"all questions: image only {image:.3f}, chance {chance:.3f}")
    assert image <= chance + 0.05


def test_labels_of_a_form_are_equally_frequent(tasks):
    """Per form of the hypothesis, not only over all: otherwise the form would tell."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for text, _, label in tasks["hypotheses"][0]:
        program = parse(text)
        counts[program.form, len(program.phrases)][label] += 1
    assert len(counts) >= 6
    for labels in counts.values():
        assert set(labels) == set(TRUTHS_OF_LABEL) and len(set(labels.values())) == 1
