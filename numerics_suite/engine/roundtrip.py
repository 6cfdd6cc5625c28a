"""A model saved with `save_pretrained` and loaded again, as the next user of the checkpoint gets it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.subjects.load import quiet_transformers

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.engine.cell_context import CellContext


def saved_and_loaded(context: CellContext, model: nn.Module, parent: Path) -> nn.Module:
    """The model after saving and loading once, at the precision and on the device of the cell.

    Args:
        context: of the cell; its subject has a path.
        model: has `save_pretrained`; the cell's own, or a result of this function.
        parent: the copy is saved into a new folder in it.
    """
    assert context.subject.path is not None
    # transformers keeps a checkpoint's own code in memory by the folder's name, so no two copies share a name.
    folder = Path(tempfile.mkdtemp(dir=parent))
    with quiet_transformers():
        model.save_pretrained(folder)  # type: ignore[operator]
    # save_pretrained leaves code of the checkpoint's own where it was; without it the copy cannot be opened.
    for file in Path(context.subject.path).glob("*.py"):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    # The code of a fixture or a trusted checkpoint is trusted in its copy too: it is the same code.
    again = replace(context.subject, kind="directory", source=str(folder), path=folder, new_head=False)
    loaded = context._loader(  # noqa: SLF001 - same loader, other folder
        again, dtype=context.recipe.parameters, attn=context.cell.attn, device=context.cell.device, seed=2
    )
    for change in context.changes:  # what is done to every model as soon as it is loaded is part of loading it
        loaded = change(loaded)
    return loaded.model
