"""`import vpworkbench as vpw` is cheap, and every public name is found there."""

import subprocess
import sys
from types import ModuleType

import pytest
from IPython.core.completer import IPCompleter

import vpworkbench as vpw
from vpworkbench.errors import CheckpointError


@pytest.mark.parametrize("name", vpw.__all__)
def test_every_name_resolves(name):
    found = getattr(vpw, name)
    assert isinstance(found, ModuleType) or callable(found)
    assert name in dir(vpw) and vpw.__dict__[name] is found


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'vpworkbench' has no attribute 'laod'"):
        print(vpw.laod)
    assert not hasattr(vpw, "laod")


def test_tab_completes_names_that_are_not_imported_yet():
    completer = IPCompleter(namespace={"vpw": vpw})
    completer.use_jedi = False
    _, matches = completer.complete("vpw.inter")
    assert [match.removeprefix("vpw") for match in matches] == [".inter_modality_flow"]


def test_import_takes_less_than_a_tenth_of_a_second():
    code = "import time; t = time.process_time(); import vpworkbench; print(time.process_time() - t)"
    times_s = [float(subprocess.check_output([sys.executable, "-c", code], timeout=60)) for _ in range(3)]
    assert min(times_s) < 0.1


def test_no_heavy_package_is_imported():
    heavy = "{'torch', 'transformers', 'pandas', 'plotly', 'papermill', 'pydantic'}"
    code = f"import sys, vpworkbench; dir(vpworkbench); print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60).strip() == "set()"


def test_a_model_that_is_not_fine_tuned_answers_nothing(model):
    with pytest.raises(CheckpointError, match="is not fine-tuned and answers nothing; name a run of 04_finetune"):
        vpw.predict(model, "photo.jpg", "what colour is the moon?")
