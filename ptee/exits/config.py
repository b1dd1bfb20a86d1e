"""The settings of the exits: where they stand, and what heads stand there."""

from __future__ import annotations

from pydantic import Field

from ptee._common.validation import FrozenConfig, Number, Whole

AUTO = "auto"  # the name of a head that is as large as its budget allows
DEFAULT_PLACES = (0.03, 0.4, 0.7)
DEFAULT_BUDGETS = (
    0.15,
    0.03,
    0.03,
)  # of the heads at those places: the first head is large, so that many images leave there
PLACES_BEHIND_FRONT = (0.4, 0.7)  # the front takes the place of the first exit

Places = tuple[float | str, ...]
Names = tuple[str, ...]
Shares = tuple[Number, ...]


class ExitsConfig(FrozenConfig):
    """Where the exits stand and which heads they get. A setting that is None depends on the others."""

    places: str | Number | Places | None = Field(
        None,
        description="Where the exits stand: a rule (pareto, fine, golden, linear or quadratic); fractions of the backbone's cost "
        "such as 0.2,0.5, each for the first block that ends there or later; or names of modules such as layer1,layer2. "
        f"Default: {','.join(map(str, DEFAULT_PLACES))}; pareto where a number of exits is given.",
    )
    number: Whole | None = Field(
        None, description="How many exits a rule places. Default: as many as there is room for, at most 5."
    )
    head: str | Names | None = Field(
        None,
        description="The heads: auto (a small residual network as large as the head budget allows), pool, bnpool, plain, convN "
        "with a number such as conv2, or a residual network by name such as res-32x2-64x2. One for all exits, or one for each. "
        "With a + behind its name (auto+, conv2+) a head also reads the answer of the exit before it. Default: auto.",
    )
    head_budget: Number | Shares | None = Field(
        None,
        description="What an auto head may cost, as a share of the backbone's cost. One for all exits, or one for each. Default: "
        f"{','.join(map(str, DEFAULT_BUDGETS))} at the default places, else 0.05.",
    )
    front: str | None = Field(
        None,
        description="A small classifier that answers before the backbone, as the first exit: a name as for the backbone, or auto "
        "for a head that learns from the images.",
    )
    front_weights: str | None = Field(None, description="A file with the weights of the front network.")
    front_mean: Number | Shares | None = Field(
        None, description="Mean of the pixels that the front network expects, where its own configuration is wrong."
    )
    front_std: Number | Shares | None = Field(None, description="Standard deviation of those pixels, likewise.")

    def resolved(self) -> ExitsConfig:
        """This config with a value in place of every None that depends on another setting."""
        network_in_front = self.front not in (None, AUTO)
        given_places = self.places is not None or self.number is not None
        places, head = self.places, self.head
        if places is None:
            places = "pareto" if self.number is not None else PLACES_BEHIND_FRONT if self.front else DEFAULT_PLACES
        if head is None:
            head = f"{AUTO}+" if self.front and not given_places else AUTO
        budget = self.head_budget
        if budget is None and not given_places and not network_in_front and head in (AUTO, f"{AUTO}+"):
            budget = DEFAULT_BUDGETS
        return self.changed(places=places, head=head, head_budget=budget)
