"""A prompt and how to put it to a pipeline; what comes back, compared to the bit and written.

>>> question = Question("a red circle", settings={"num_inference_steps": 4})
>>> answer = question.put_to(pipe)
>>> answer.write(Path("picture.png"))
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .answer import Answer
from .errors import UsageError

# Arguments that take pictures, films or sound: a prompt cannot stand in for them.
_MEDIA = re.compile(r"(?!.*(attention|embeds|ip_adapter))(.*_)?(image|images|video|audio|mask)")


@dataclass(frozen=True)
class Question:
    """What is asked: the same each time it is put, random numbers included.

    settings: further arguments of the pipeline's call, by diffusers' names.
    """

    prompt: str
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self, pipeline_class: type) -> None:
        """Refuse what this class of pipelines cannot be asked, before it is loaded.

        Raises:
            UsageError: it takes no prompt, needs more than one, or has not these settings.
        """
        name, parameters = pipeline_class.__name__, _parameters(pipeline_class)
        if "prompt" not in parameters:
            raise UsageError(
                f"{name} takes no prompt; it takes {', '.join(parameters)}. A script can call it: "
                "greenroom exec script.py"
            )
        missing = [
            parameter.name
            for parameter in parameters.values()
            if parameter.default is parameter.empty
            and parameter.name not in {"prompt", *self.settings}
        ]
        if missing:
            raise UsageError(_needs_more(name, missing))
        for setting in self.settings:
            if setting not in parameters:
                near = difflib.get_close_matches(setting, parameters, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                raise UsageError(
                    f"{name} has no setting {setting!r}{hint}. It has {', '.join(parameters)}"
                )

    def put_to(self, pipe: Any) -> Answer:
        """Call the pipeline once.

        Raises:
            UsageError: it refuses its arguments, or needs more than a prompt.
        """
        parameters = _parameters(type(pipe))
        call: dict[str, Any] = {"prompt": self.prompt}
        if "generator" in parameters:
            # On the CPU, so that the numbers are the same whatever the device.
            call["generator"] = torch.Generator("cpu").manual_seed(self.seed)
        if "output_type" in parameters:
            call["output_type"] = "np"  # as computed; a picture of bytes would hide differences
        torch.manual_seed(self.seed)  # some draw without the generator that they were given
        try:
            return Answer.of(pipe(**{**call, **self.settings}))
        except (TypeError, ValueError, AttributeError) as error:
            refusal = _refusal(pipe, error, call.keys() | self.settings.keys())
            if refusal is None:
                raise
            raise UsageError(refusal) from error


def _parameters(pipeline_class: type) -> dict[str, inspect.Parameter]:
    """What a call takes by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(pipeline_class.__call__)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if name != "self" and parameter.kind in kinds
    }


def _needs_more(name: str, missing: list[str]) -> str:
    return (
        f"{name} needs more than a prompt: {', '.join(missing)}. The command line has only a "
        "prompt to give; a script can give the rest: greenroom exec script.py"
    )


def _refusal(pipe: Any, error: Exception, given: set[str]) -> str | None:
    """What to say of an error in the call, if it is about what the call was given."""
    name, reason = type(pipe).__name__, " ".join(str(error).split())
    missing = [
        parameter.name
        for parameter in _parameters(type(pipe)).values()
        if parameter.default is None
        and parameter.name not in given
        and _MEDIA.fullmatch(parameter.name)
    ]
    if missing:
        return f"{_needs_more(name, missing)} ({type(error).__name__}: {reason})"
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    # diffusers' pipelines check their inputs themselves; an error from further down is another's.
    is_own = traceback is not None and (
        traceback.tb_frame.f_globals.get("__name__") == type(pipe).__module__
    )
    return f"{name} refuses: {reason}" if is_own and isinstance(error, ValueError) else None
