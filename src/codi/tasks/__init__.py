"""Tasks: a user's input image, the adapter's condition made from it, and scores of the output. One file per task."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UserError, nearest
from .base import Task, means
from .canny import Canny
from .depth import Depth
from .edit import Edit
from .generate import Generate
from .inpaint import Inpaint
from .upscale import Upscale

__all__ = ["TASKS", "Task", "get_task", "means"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (Upscale, Inpaint, Depth, Canny, Edit, Generate)}


def get_task(name: str, **options: Any) -> Task:
    """Return the task of that name.

    Raises UserError for an unknown name or option, with the nearest one and the list.
    """
    if name not in TASKS:
        raise UserError(f"{name}: unknown task{nearest(name, TASKS)}: use one of {', '.join(sorted(TASKS))}")
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in known:
            use = f"use {', '.join(known)}" if known else "it has none"
            raise UserError(f"{option}: unknown option of task {name}{nearest(option, known)}: {use}")
    return TASKS[name](**options)
