"""Turns a function of a `Subject` into a property: named, timed, seeded, its errors sorted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from hf_memory.evaluation.properties_report import NotApplicableError, Result, is_refusal, one_line
from hf_memory.evaluation.properties_subject import BUDGETS, Budget, Subject, quiet


@dataclass(frozen=True)
class Property:
    """
    One property. Calling it checks one model.

    Args:
        name: what the report calls it.
        check: takes a `Subject`, returns a `Result` whose `name` and `seconds` are empty.
        needs_grad: whether it runs with gradients on.
    """

    name: str
    check: Callable[[Subject], Result]
    needs_grad: bool = False

    @property
    def description(self) -> str:
        """First line of the docstring."""
        return (self.check.__doc__ or "").strip().split("\n")[0]

    def __call__(
        self, model: PreTrainedModel, tolerance: float | None = None, budget: Budget | str = "quick", seed: int = 0
    ) -> Result:
        """
        Checks `model` (left in the mode, and with the parameters, it came with).

        Args:
            model: a causal LM of transformers, or registered with it.
            tolerance: largest accepted deviation; by default from the dtype and the model's conditioning.
            budget: `"quick"`, `"full"` or a `Budget`.
            seed: seed of all random inputs.
        """
        return self.run(Subject(model, resolve_budget(budget), seed, tolerance))

    def run(self, subject: Subject) -> Result:
        start, was_training = time.perf_counter(), subject.model.training
        subject.model.eval()
        try:
            with quiet(), torch.random.fork_rng(), torch.set_grad_enabled(self.needs_grad):
                torch.manual_seed(0)
                result = self.check(subject)
        except NotApplicableError as error:
            result = Result("", "not-applicable", detail=one_line(error))
        except Exception as error:
            status = "refused" if is_refusal(error) else "error"
            detail = one_line(error) if status == "refused" else f"{type(error).__name__}: {one_line(error)}"
            result = Result("", status, detail=detail)
        finally:
            subject.model.train(was_training)
        return replace(result, name=self.name, seconds=time.perf_counter() - start)


def resolve_budget(budget: Budget | str) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise ValueError(f"budget={budget!r} is not known; use one of {', '.join(BUDGETS)} or a Budget")
    return BUDGETS[budget]
