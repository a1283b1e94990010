"""Usual causes of each alarm and verdict, what to try then, and where the documentation shows such a run."""

from typing import NamedTuple


class Advice(NamedTuple):
    """Sentences for a user, and the section of the documentation with pictures of such runs."""

    cause: str
    remedy: str
    page: str

    @property
    def text(self) -> str:
        """The advice as one paragraph."""
        return f"{self.cause} {self.remedy} See {self.page}."


def _page(section: str) -> str:
    return f"docs/collapse.md#{section}"


# Keys are the names of alarms, and of the states and findings of a verdict.
ADVICE = {
    "complete_collapse": Advice(
        "All images have nearly the same output. This happens when nothing keeps the branches apart: no predictor, "
        "stop-gradient, filter, Sinkhorn or centering, or a learning rate that is far too high.",
        "Compare method.online and method.target with the preset's row in docs/methods.md, then divide optim.lr by 4.",
        _page("complete-collapse"),
    ),
    "dimensional_collapse": Advice(
        "The outputs still differ, but only along one or a few directions. It happens when the online branch does not "
        "have a lower rank than the target.",
        "Check that the predictor or filter and the stop-gradient are in place, that a target filter has a negative "
        "power, and lower optim.lr, optim.weight_decay or the temperature of the targets.",
        _page("dimensional-collapse"),
    ),
    "falling_rank": Advice(
        "The rank is well below its own highest value, so dimensions that were in use are being lost. Causes are a "
        "learning rate that is too high, targets that follow too quickly, or strong weight decay.",
        "Raise method.ema.momentum where there is an average, or divide optim.lr by 2.",
        _page("falling-rank"),
    ),
    "loss_at_floor": Advice(
        "The task is solved exactly, which only constant outputs or views that are too alike allow.",
        "Look at the rank of the target. If it is low, this is a collapse. If not, make the augmentation stronger.",
        _page("loss-at-its-floor"),
    ),
    "non_finite_loss": Advice(
        "A number overflowed. The usual causes are a learning rate that is too high, a missing warm-up, or fp16.",
        "Divide optim.lr by 4, set optim.warmup=5%, or choose train.precision=bf16 or fp32.",
        _page("non-finite-loss"),
    ),
    "no_gain": Advice(
        "The features are no better than those of the untrained encoder. The run is too short, the learning rate does "
        "not fit, or the recipe belongs to another data set.",
        "Train longer, try optim.lr times 3 and divided by 3, and use the recipe that was made for this preset.",
        _page("weak"),
    ),
    "falling_accuracy": Advice(
        "The features were better earlier in this run. Training now destroys what it had learned.",
        "Divide optim.lr by 2 or raise method.ema.momentum. The best checkpoint is kept where checkpoint.best=true.",
        _page("weak"),
    ),
    "rising_loss": Advice(
        "The online branch follows the target less well than it did before.",
        "Divide optim.lr by 2, or raise method.ema.momentum so that the target moves more slowly.",
        _page("weak"),
    ),
}  # fmt: skip
