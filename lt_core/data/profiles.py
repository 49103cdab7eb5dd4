"""Profiles: which data sets and backbones stand in for the paper's, and how they are trained.

One declarative file each, `lt_core/profiles/NAME.toml`, or a file of one's own that is named by its path;
unknown, mistyped or unused keys are errors.

    profile = load_profile("embedded")             # or load_profile("path/to/my_profile.toml")
    profile.backbone("sqrt").sampler
"""

from __future__ import annotations

import tomllib
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lt_core import paths
from lt_core.checks import ProfileError, check_name, unknown

FOLDER = paths.PACKAGE / "profiles"
STARTS = ("scratch", "imagenet", "simclr_imagenet")  # random or public weights; else a pretraining of ours,
FILES = (".safetensors", ".pth", ".pt", ".bin")  # or a file of weights

# Losses with numbers of their own, which a profile must state: they differ between data sets.
LOSS_OPTIONS = {
    "lade": ("strength", "penalty"),
    "ldam_drw": ("max_margin", "scale", "deferred_until"),
    "rsg": ("max_margin", "scale", "deferred_until"),
}

Role = Literal["imagenet_lt", "places_lt"]
SplitName = Literal["train", "val", "test"]
Name = Annotated[str, AfterValidator(partial(check_name, "the name"))]  # part of a path
Count = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]


class _Typed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Augmentation(_Typed):
    """What happens to a training batch, in this order."""

    random_resized_crop: BelowOne = 0.0  # smallest area kept, fraction; 0: off
    crop_padding: Count = 0  # pixels of reflected border before a random crop
    flip: bool = False  # left-right with probability 0.5
    colour_jitter: BelowOne = 0.0  # brightness, contrast, saturation: 1 +- this
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # largest turn of the colour circle, fraction
    jitter_share: Annotated[float, Field(gt=0, le=1)] = 1.0  # images whose colours are changed, fraction
    grey: Share = 0.0  # images made grey, fraction


class Recipe(_Typed):
    """One way of training: SGD with momentum, cosine decay to 0 (paper, App. A)."""

    epochs: Annotated[int, Field(ge=1, le=10**6)]
    batch_size: Annotated[int, Field(ge=2, le=10**6)]  # images, over all processes
    learning_rate: Annotated[float, Field(ge=0)]  # of the backbone at the start; 0 freezes it
    classifier_learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    momentum: BelowOne = 0.9
    nesterov: bool = False
    warmup_epochs: Count = 0
    input_size: Annotated[int, Field(ge=0, le=4096)] = 0  # pixels, by bicubic resampling; 0: as stored
    precision: Literal["float32", "bfloat16"] = "float32"  # of a CPU; a GPU always takes bfloat16
    augmentation: Augmentation = Augmentation()

    @property
    def frozen(self) -> bool:
        return self.learning_rate == 0


class Pretraining(_Typed):
    """A network trained on another data set first; its weights start a backbone."""

    dataset: Name
    network: str
    recipe: str
    objective: Literal["supervised", "simclr"] = "supervised"


class Backbone(_Typed):
    """A network trained on one role's data set; Tables 4 to 9 compare several."""

    role: Role
    network: str
    recipe: str
    start: str = "scratch"  # one of STARTS, the name of a pretraining or a file that ends as one of FILES
    sampler: str = "square_root"
    loss: str = "cross_entropy"
    loss_options: dict[str, float] = {}  # those of LOSS_OPTIONS; the model has `scale`, RSG `deferred_until`
    classifier: Literal["cosine", "cosine_fixed", "dot_product", "causal_norm"] = "cosine"
    leave_out: Literal["nothing", "few"] = "nothing"  # classes with n <= 20 not trained on (Table 2)
    seeds: Annotated[list[Count], Field(min_length=1)] = [0]
    feature_dims: Count = 0  # principal directions kept in the cache; 0: all
    stored_splits: Annotated[list[SplitName], Field(min_length=1)] = ["train", "val", "test"]  # of all seeds

    @model_validator(mode="after")
    def _loss_and_classifier_fit(self) -> Backbone:
        if self.loss in ("ldam_drw", "rsg") and self.classifier != "cosine_fixed":
            raise ValueError(f"loss {self.loss!r} takes margins off cosines: classifier must be cosine_fixed")
        if wrong := set(self.loss_options) ^ set(LOSS_OPTIONS.get(self.loss, ())):
            names = ", ".join(sorted(wrong))
            raise ValueError(f"loss {self.loss!r}: loss_options lack or must not have {names}")
        if self.classifier == "causal_norm" and self.feature_dims:
            raise ValueError("causal_norm splits the features into heads: feature_dims must be 0")
        return self


class OwnImages(_Typed):
    """A data set of one's own (`datasets.own_listing`); relative paths start at the data root."""

    folder: str  # of train/<class>/*, val/, test/, or of the images that the lists name
    lists: dict[SplitName, str] = {}  # files of `path label` lines, labels from 0; none: the folder's tree
    size: Annotated[int, Field(ge=0, le=4096)] = 0  # pixels of images held in memory; 0: they stay files

    @model_validator(mode="after")
    def _train_is_named(self) -> OwnImages:
        if self.lists and "train" not in self.lists:
            raise ValueError("lists must name train")
        return self


class OlderCache(_Typed):
    """Caches whose `meta.json` does not state what the profile asks for, and which are used all the same."""

    backbones: list[str]
    states: dict[str, str] = {}  # entry -> what they state in place of what the profile asks for
    lacks: list[str] = []  # entries that they do not have
    reason: str


class Profile(_Typed):
    """Everything that differs between embedded, digits, small and paper."""

    name: Name
    description: str
    trains: bool  # False: the caches come with the repository
    datasets: dict[Role, Name]
    images: dict[Name, OwnImages] = {}  # data sets of one's own, by name
    recipes: dict[str, Recipe]
    pretraining: dict[Name, Pretraining] = {}
    backbones: dict[Name, Backbone]
    aliases: dict[Name, str] = {}  # a second name -> the backbone that it is, trained once
    older_caches: list[OlderCache] = []

    @model_validator(mode="before")
    @classmethod
    def _aliases_are_backbones(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Every alias as a backbone, so that whatever asks for its name finds it."""
        backbones, aliases = content.get("backbones", {}), content.get("aliases", {})
        if not isinstance(backbones, dict) or not isinstance(aliases, dict):
            return content  # refused as what it is
        for alias, backbone in aliases.items():
            if backbone not in backbones or backbone in aliases:
                raise ValueError(unknown(f"backbone of alias {alias}", backbone, list(backbones)))
        return content | {"backbones": backbones | {a: backbones[b] for a, b in aliases.items()}}

    @model_validator(mode="after")
    def _names_fit(self) -> Profile:
        """What is named exists, and what exists is named: a forgotten entry is a typing error elsewhere."""
        if set(self.datasets) != {"imagenet_lt", "places_lt"}:
            raise ValueError("datasets must name imagenet_lt and places_lt")
        recipes = {one.recipe for one in (*self.backbones.values(), *self.pretraining.values())}
        starts = {backbone.start for backbone in self.backbones.values()}
        for name in recipes - set(self.recipes):
            raise ValueError(unknown("recipe", name, list(self.recipes)))
        for name in (one for one in starts - {*STARTS, *self.pretraining} if not one.endswith(FILES)):
            raise ValueError(unknown("start", name, [*STARTS, *self.pretraining]))
        for name in set(self.recipes) - recipes:
            raise ValueError(f"recipe {name!r} is used by no backbone: remove it")
        for name in set(self.pretraining) - starts:
            raise ValueError(f"pretraining {name!r} is used by no backbone: remove it")
        for name, backbone in self.backbones.items():
            if backbone.loss == "rsg" and self.recipes[backbone.recipe].frozen:
                raise ValueError(f"backbone {name!r}: rsg trains the last stage, so it cannot be frozen")
        return self

    def backbone(self, name: str) -> Backbone:
        """The backbone of that name; raises ProfileError listing the known ones."""
        if name not in self.backbones:
            raise ProfileError(f"profile {self.name}: {unknown('backbone', name, list(self.backbones))}")
        return self.backbones[name]

    def trained_as(self, name: str) -> str:
        """The name that a backbone is trained and cached under: another one for an alias."""
        return self.aliases.get(name, name)

    def dataset_of(self, backbone: str) -> str:
        """Name of the data set that a backbone is trained on."""
        return self.datasets[self.backbone(backbone).role]


def profile_names() -> list[str]:
    """The profiles that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


@cache
def load_profile(name: str) -> Profile:
    """The profile of that name, or in the file NAME.toml that a path names.

    Raises ProfileError for an unknown name or a wrong file.
    """
    if not name.endswith(".toml"):
        if name not in profile_names():
            raise ProfileError(unknown("profile", name, profile_names()))
        return read_profile(FOLDER / f"{name}.toml")
    if Path(name).stem in profile_names():
        raise ProfileError(f"{name}: {Path(name).stem} is a profile of this repository, give it another name")
    return read_profile(Path(name))


def read_profile(path: Path) -> Profile:
    """A profile from its file. `same_as = "OTHER"` takes all that the file does not say from OTHER's.

    Raises ProfileError naming the file and the first wrong entry.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        if base := content.pop("same_as", None):
            if base not in profile_names():
                raise ValueError(unknown("profile", base, profile_names()))
            content = _merged(tomllib.loads((FOLDER / f"{base}.toml").read_text(encoding="utf-8")), content)
        return Profile(name=path.stem, **content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "profile"
        raise ProfileError(f"{path.name}: {place}: {first['msg']}") from None
    except (ValueError, OSError, TypeError, RecursionError) as error:  # not TOML, not text; unreadable; deep
        raise ProfileError(f"{path.name}: {error}") from None


def _merged(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `own`, table by table: a recipe may change its epochs and nothing else."""
    both = {key for key in own if isinstance(own[key], dict) and isinstance(base.get(key), dict)}
    return base | own | {key: _merged(base[key], own[key]) for key in both}
