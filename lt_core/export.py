"""A trained network with its classifiers as two files, for use outside this repository or on a model hub.

    export_backbone("small", "sqrt", 0, folder)          # model.safetensors and config.json
    model = load_model(folder)                           # pixels [B, C, S, S], 0..255 -> scores [B, N]
    model.class_names[model(model.pixels("photo.jpg")).argmax()]

model.safetensors: `backbone.*`, `classifier.weight` [N, F] and `classifier.scale` as trained, `prototypes`,
`counts`, `hybrid.K` [N, F] for each k of the ensemble, and `rows` [E, N, F], `scales` [N], `offsets` [N] of
the classifier that is used (`Rows`). Nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from lt_core import backbones, classifiers, paths
from lt_core.baselines import WeightScaling, adjust
from lt_core.cache import OWN_HASH, FeatureCache, meta_digest
from lt_core.checks import CacheError, InputError, first_line
from lt_core.data.image_files import SQUARE, ImageFiles, Square
from lt_core.data.profiles import load_profile
from lt_core.models import CosineClassifier, build_backbone
from lt_core.train import load_checkpoint
from lt_core.transfer import TEMPERATURE, hybrid_classifiers

FORMAT_VERSION = 2
TENSORS, CONFIG = "model.safetensors", "config.json"


class Rows(nn.Module):
    """log mean_e softmax(scales * cos(f, rows_e)) + offsets: what nearly every classifier here is.

    rows [E, N, F]: one matrix, or those of an ensemble; scales [N]; offsets [N], as of logit adjustment.
    """

    def __init__(self, rows: Tensor, scales: Tensor, offsets: Tensor) -> None:
        super().__init__()
        for name, tensor in {"rows": rows, "scales": scales, "offsets": offsets}.items():
            self.register_buffer(name, tensor.detach().float().cpu().contiguous())

    def forward(self, features: Tensor) -> Tensor:
        """Features [M, F] -> scores [M, N]: log probabilities where no offset is added."""
        unit = normalize(features, dim=1)
        logits = torch.stack([self.scales * linear(unit, normalize(rows, dim=1)) for rows in self.rows])
        return logits.log_softmax(dim=2).logsumexp(dim=0) - torch.tensor(len(self.rows)).log() + self.offsets


NOT_ROWS = ("disalign", "ncm", "image_density", "image_evidence")  # those that are not of this form


def rows_of(cache: FeatureCache, name: str, setting: classifiers.Setting) -> Rows:
    """A classifier of the registry with one of its settings as `Rows`; InputError for one that is none."""
    name = classifiers.name_of(cache, name)
    from_rows = name in classifiers.ROWS or name.startswith("ensemble")
    if name in NOT_ROWS or not (from_rows or classifiers.kind_of(cache) == "cosine"):
        raise InputError(f"{name} of {cache.meta['backbone']} cannot be stored as rows of cosines")
    scales, offsets = torch.full((len(cache.counts),), cache.scale), torch.zeros(len(cache.counts))
    if "logit_adjustment" in name:
        offsets = adjust(offsets[None], cache.counts, setting["strength"])[0]
    if name in classifiers.ROWS or name.startswith("ensemble+"):
        rows = classifiers.rows(cache, name.partition("+logit")[0])
    elif name == "ensemble_tuned":
        ks, temperature = classifiers.ensemble_ks(cache), setting["temperature"]
        rows = hybrid_classifiers(cache.prototypes, cache.weights, cache.counts, ks, temperature)
    elif name == "cosine" or name.startswith("logit_adjustment"):
        rows = [cache.weights]
    else:  # a head that was trained on the features
        head = classifiers.build(cache, name, **setting)
        if isinstance(head, WeightScaling):
            rows, scales = [head.own.weight], head.scales * head.own.scale
        elif isinstance(head, CosineClassifier):
            rows, scales = [head.weight], head.scale.expand(len(cache.counts))
        else:
            raise InputError(f"{name} cannot be stored as rows of cosines")
    return Rows(torch.stack(list(rows)), scales, offsets)


class ExportedModel(nn.Module):
    """Network and classifier: pixels [B, C, S, S], 0..255 -> scores [B, N]; without a network, of features.

    The scores of the classifier that is used; `config` names it and says what else the file holds.
    """

    def __init__(self, backbone: nn.Module | None, head: Rows, config: dict[str, Any]) -> None:
        super().__init__()
        self.backbone, self.head, self.config = backbone, head, config
        self.eval().requires_grad_(False)

    @property
    def class_names(self) -> list[str]:
        return self.config["class_names"]

    def pixels(self, file: str | Path) -> Tensor:
        """Pixels [1, 3, S, S] of an image file, its central square, as in training; raises DataError."""
        path = Path(file)
        files = ImageFiles(path.parent, np.array([path.name]))
        return files.pixels(0, self.config["input_size"], Square(**self.config["square"]))[None]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.float() if self.backbone is None else self.backbone(inputs.float()))


def save_model(
    folder: Path,
    cache: FeatureCache,
    backbone: nn.Module | None,
    network: str,
    input_size: int,
    chosen: str = "ensemble",
    setting: classifiers.Setting | None = None,
) -> ExportedModel:
    """Write the network with its classifiers into a folder; `chosen` is the one that a loaded model uses.

    cache: of this very network, all its feature dimensions. backbone: None where only features are known.
    """
    if backbone is not None and backbone.num_features != cache.weights.shape[1]:
        raise InputError(
            f"the cache keeps {cache.weights.shape[1]} of {backbone.num_features} feature dimensions: set "
            "feature_dims = 0 in the profile and make it again"
        )
    head = rows_of(cache, chosen, setting or {})
    ks = classifiers.ensemble_ks(cache)
    hybrids = hybrid_classifiers(cache.prototypes, cache.weights, cache.counts, ks, TEMPERATURE)
    tensors = {f"backbone.{n}": t for n, t in (backbone.state_dict() if backbone else {}).items()}
    tensors |= {f"hybrid.{k}": rows for k, rows in zip(ks, hybrids, strict=True)}
    tensors |= {
        "classifier.weight": cache.weights,
        "classifier.scale": torch.tensor(cache.scale),
        "prototypes": cache.prototypes,
        "counts": cache.counts,
        **head.state_dict(),
    }
    mean, std = ([], []) if backbone is None else (backbone.mean.flatten(), backbone.std.flatten())
    config: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "network": network if backbone is not None else None,
        "input_size": input_size,
        "square": asdict(getattr(backbone, "square", SQUARE)),  # what an image is cut to
        "mean": [float(value) for value in mean],  # of pixels 0..255; the network applies them
        "std": [float(value) for value in std],
        "class_names": cache.class_names,
        "ensemble_k": ks,
        "classifier": chosen,
        "setting": setting or {},
        **{key: cache.meta.get(key) for key in ("dataset", "backbone", "seed", "code_version")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with paths.atomic(folder / TENSORS) as temporary:
        # Copies: the format takes no two tensors that share memory.
        copies = {
            n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
        }
        save_file(copies, temporary)
    config["sha256"] = paths.file_digest(folder / TENSORS)
    config[OWN_HASH] = meta_digest(json.loads(json.dumps(config)))  # as it will be read
    with paths.atomic(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return ExportedModel(backbone, head, config)


def trained_job(
    profile: str, backbone: str, seed: int, data_root: Path | None = None, checkpoint: Path | None = None
) -> backbones.Job:
    """A backbone as it was trained, with the weights of its run's last checkpoint or of the one named.

    A frozen one has its classifier in its cache, and none in the job.
    """
    chosen = load_profile(profile)
    job = backbones.prepare(chosen, backbone, seed, data_root)
    if job.recipe.frozen and checkpoint is None:
        return job
    run = backbones.run_folder(chosen, job.name, job.backbone, seed, job.data)
    path = checkpoint or run / "last.pt"
    saved = load_checkpoint(path)
    try:
        job.model.load_state_dict(saved["model"])
    except (KeyError, RuntimeError, TypeError):
        raise CacheError(f"{path} is not a checkpoint of {chosen.name}/{backbone}") from None
    return job


def export_backbone(
    profile: str,
    backbone: str,
    seed: int,
    folder: Path,
    classifier: str = "ensemble",
    data_root: Path | None = None,
    checkpoint: Path | None = None,
) -> ExportedModel:
    """Write a backbone of a profile with its classifiers; a setting is chosen on validation images.

    Features are extracted again, for a cache may keep some dimensions only; of a frozen backbone the cache is
    read.
    """
    job = trained_job(profile, backbone, seed, data_root, checkpoint)
    if job.recipe.frozen and checkpoint is None:
        cache = backbones.load(profile, backbone, seed, data_root)
    else:
        splits = {name: split for name, split in job.data.splits.items() if name != "test"}
        job = replace(job, data=replace(job.data, splits=splits))
        features = backbones.extract_splits(job.model.backbone.to(job.machine.device), job)
        features = {name: values.float() for name, values in features.items()}
        cache = replace(backbones.as_cache(job, features), meta=backbones.provenance(job))
    setting = classifiers.fit(cache.to(classifiers.device()), classifier).setting
    size = job.recipe.input_size or job.model.backbone.input_size
    return save_model(folder, cache, job.model.backbone, job.backbone.network, size, classifier, setting)


def load_model(folder: str | Path) -> ExportedModel:
    """The model that `save_model` wrote, on the CPU; raises CacheError for a missing or damaged one."""
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if config["format_version"] != FORMAT_VERSION:
            raise CacheError(f"{folder} has format version {config['format_version']}, not {FORMAT_VERSION}")
        if paths.file_digest(folder / TENSORS) != config["sha256"] or meta_digest(config) != config[OWN_HASH]:
            raise CacheError(f"{folder} does not have the hashes that {CONFIG} states: copy it again")
        state = load_file(folder / TENSORS)
        head = Rows(*(state[name] for name in ("rows", "scales", "offsets")))
        backbone = None
        if config["network"]:
            own = {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}
            with torch.random.fork_rng(devices=[]):  # its random start is replaced at once
                backbone = build_backbone(config["network"])
            backbone.load_state_dict(own)
            for name in ("mean", "std"):  # not part of a network's state, and SimCLR's have their own
                getattr(backbone, name).copy_(torch.tensor(config[name]).view(1, -1, 1, 1))
    except FileNotFoundError:
        raise CacheError(f"there is no exported model in {folder}") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CacheError(f"{folder} does not hold a whole exported model ({first_line(error)})") from None
    return ExportedModel(backbone, head, config)
