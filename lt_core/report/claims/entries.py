"""The classifiers, backbones and systems that claims speak of, by short names."""

from __future__ import annotations

from functools import partial

from lt_core.report.claims.study import Entry, System
from lt_core.report.systems import IMAGENET, TRAINED
from lt_core.report.systems import PLACES as PLACES_SYSTEMS

cos = partial(Entry, method="cosine")
dot = partial(Entry, method="dot_product")
proto = partial(Entry, method="prototypes")
pc = partial(Entry, method="prototypes+cosine")
wh20 = partial(Entry, method="wh20")
wh100 = partial(Entry, method="wh100")
ens = partial(Entry, method="ensemble_wh_0_20_100")
whc20 = partial(Entry, method="whc20")
whc100 = partial(Entry, method="whc100")
whc_ens = partial(Entry, method="ensemble_proto_whc_20_100")  # Table 2
p2w = partial(Entry, method="attention_p2w")
w2p = partial(Entry, method="attention_w2p")
w2w = partial(Entry, method="attention_w2w")
p2p = partial(Entry, method="attention_p2p")

GROUPS = ("many", "medium", "few")
ALL = (*GROUPS, "total")
SPLITS = ("train", "val")  # of prototypes

# Table 3: stand-ins of ResNet101 and ResNet152, supervised; SimCLR and supervised on one network (Table 9).
R101, R152, SIMCLR, SUPERVISED = "imagenet_sqrt", "imagenet_deep_sqrt", "simclr_sqrt", "supervised_sqrt"
PLACES = ("supervised_sqrt", "supervised_uniform", "simclr_sqrt", "simclr_uniform")  # Table 9
TABLE9_METHODS = (
    *("cosine", "prototypes", "prototypes+cosine", "wh20", "wh100"),
    *("ensemble_whc_20_100", "ensemble_wh_0_20_100"),
)

COMPARED = [System(name, "imagenet_lt", "sqrt") for name in IMAGENET]
COMPARED_R152 = [System(name, "places_lt", R152) for name in PLACES_SYSTEMS]
COMPARED_R101 = [  # those that need no backbone of their own; print quotes DisAlign alone
    System(name, "places_lt", R101) for name in PLACES_SYSTEMS if name not in TRAINED["places_lt"]
]
COMPARED_SMALL = [System("disalign", "places_lt", SUPERVISED)]  # supervised, as the quoted DisAlign R101
SETTINGS = {R152: COMPARED_R152, R101: COMPARED_R101, SIMCLR: COMPARED_SMALL}  # own rows of Table 3


def own_rows(entry: Entry) -> list[Entry]:
    """The other own rows of Table 1, on the backbone of one of them."""
    rows = [row(entry.backbone) for row in (cos, proto, pc, wh20, wh100, ens)]
    return [row for row in rows if row != entry]
