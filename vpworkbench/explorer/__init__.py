"""See and touch attention masks: `explore(model)` in a notebook.

The tensors stay in the kernel; a click sends one slice to the page, hover sends nothing.
"""

from vpworkbench.system import collector_off

with collector_off():
    from vpworkbench.explorer.explorer import Explorer, explore

__all__ = ["Explorer", "explore"]
