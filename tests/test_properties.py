"""What must hold for any input: transfer, samplers, lists, the feature cache."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lt_core.cache import FeatureCache, load_cache, save_cache
from lt_core.checks import DataError, InputError
from lt_core.data.datasets import long_tail_lists, read_list
from lt_core.samplers import SAMPLERS, class_aware, epoch_batches, square_root, uniform
from lt_core.transfer import (
    attention,
    continual_classifiers,
    ensemble_probabilities,
    hybrid_classifiers,
    knowledge_transfer,
    prototypes,
)

some = settings(max_examples=60, deadline=None)
seeds = st.integers(0, 2**32 - 1)
long_tails = st.lists(st.integers(1, 40), min_size=1, max_size=8)
NUMBERS = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8]


# ---------------------------------------------------------------- transfer


@st.composite
def cases(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """Prototypes, weights, counts and ks, each k exceeded by some class; the vectors are of any direction."""
    classes, dims = draw(st.integers(1, 9)), draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(seeds))
    counts = np.array(draw(st.lists(st.integers(1, 300), min_size=classes, max_size=classes)))
    ks = draw(st.lists(st.integers(0, int(counts.max()) - 1), min_size=1, max_size=4))
    return generator.normal(size=(classes, dims)), generator.normal(size=(classes, dims)), counts, tuple(ks)


@some
@given(cases(), st.floats(1e-3, 1e3))
def test_attention_is_a_distribution_over_the_classes_above_k(case, tau):
    p, w, counts, ks = case
    for k in ks:
        found = attention(p, w, counts, k, tau).numpy()
        np.testing.assert_allclose(found.sum(axis=1), 1)
        assert (found >= 0).all() and (found[:, counts <= k] == 0).all()
        keys = w / np.linalg.norm(w, axis=1, keepdims=True)
        recomposed = knowledge_transfer(p, w, counts, k, tau).numpy()
        np.testing.assert_allclose(recomposed, found @ keys, atol=1e-12)
        assert (np.linalg.norm(recomposed, axis=1) <= 1 + 1e-12).all()  # a mean of unit vectors


@some
@given(cases(), seeds)
def test_the_order_of_classes_does_not_matter(case, seed):
    p, w, counts, ks = case
    order = np.random.default_rng(seed).permutation(len(counts))
    for build in (hybrid_classifiers, continual_classifiers):
        for one, other in zip(
            build(p, w, counts, ks), build(p[order], w[order], counts[order], ks), strict=True
        ):
            np.testing.assert_allclose(other, one[order], atol=1e-10)


@some
@given(cases(), seeds)
def test_turning_the_feature_space_turns_the_classifiers(case, seed):
    p, w, counts, ks = case
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(p.shape[1],) * 2))
    for one, other in zip(
        hybrid_classifiers(p, w, counts, ks), hybrid_classifiers(p @ turn, w @ turn, counts, ks), strict=True
    ):
        np.testing.assert_allclose(other, one.numpy() @ turn, atol=1e-9)


@some
@given(cases())
def test_only_which_classes_exceed_k_matters_not_by_how_much(case):
    p, w, counts, ks = case
    k = min(ks)
    clipped = np.where(counts > k, k + 1, 1)
    torch.testing.assert_close(
        hybrid_classifiers(p, w, clipped, (k,)), hybrid_classifiers(p, w, counts, (k,)), atol=1e-10, rtol=0
    )


@some
@given(cases(), seeds, st.floats(0.1, 100))
def test_the_ensemble_is_a_distribution_between_its_members(case, seed, scale):
    p, w, counts, ks = case
    features = np.random.default_rng(seed).normal(size=(6, p.shape[1]))
    built = hybrid_classifiers(p, w, counts, ks)
    members = torch.stack([ensemble_probabilities(features, [one], scale) for one in built])
    found = ensemble_probabilities(features, built, scale)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6, dtype=torch.float64))
    assert (found >= members.amin(0) - 1e-12).all() and (found <= members.amax(0) + 1e-12).all()


@st.composite
def matrices(draw, shape) -> np.ndarray:
    """Any numbers at all, or (so that not every case ends in an error) finite ones other than 0."""
    dtype = np.dtype(draw(st.sampled_from(NUMBERS)))
    elements = None
    if draw(st.booleans()):
        elements = st.integers(1, 100)
        if dtype.kind == "f":
            width = 8 * dtype.itemsize
            elements = st.floats(width=width, allow_nan=False, allow_infinity=False).filter(bool)
    return draw(arrays.arrays(dtype, shape, elements=elements))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_array_gives_a_finite_result_or_an_input_error(data):
    """NaN, infinity, zeros, the smallest and the largest numbers, of every type."""
    shape = data.draw(arrays.array_shapes(min_dims=2, max_dims=2, max_side=4))
    p, w = data.draw(matrices(shape)), data.draw(matrices(shape))
    counts = data.draw(arrays.arrays(np.int64, shape[0], elements=st.sampled_from([300, 21, 20, 1, 0])))
    untouched = p.tobytes(), w.tobytes()
    try:
        built = hybrid_classifiers(p, w, counts, (0, 20))
        probabilities = ensemble_probabilities(p, built)
        means = prototypes(p, np.arange(len(p)), len(p))
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return
    finally:
        assert (p.tobytes(), w.tobytes()) == untouched
    assert all(torch.isfinite(one).all() for one in built)
    torch.testing.assert_close(probabilities.sum(dim=1).float(), torch.ones(len(p)))
    torch.testing.assert_close(means.norm(dim=1).float(), torch.ones(len(p)))


# ---------------------------------------------------------------- samplers


@some
@given(long_tails, st.integers(1, 300), seeds)
def test_uniform_uses_every_image_equally_often(counts, length, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    often = np.bincount(uniform(labels, length, np.random.default_rng(seed)), minlength=len(labels))
    assert often.sum() == length and often.max() - often.min() <= 1


@some
@given(long_tails, st.integers(1, 6), seeds)
def test_class_aware_uses_every_class_and_every_image_of_it_equally_often(counts, cycles, seed):
    labels = 3 * np.repeat(np.arange(len(counts)), counts)  # with gaps
    drawn = class_aware(labels, 4 * len(counts) * cycles, np.random.default_rng(seed))
    assert (np.bincount(labels[drawn])[::3] == 4 * cycles).all()
    often = np.bincount(drawn, minlength=len(labels))
    for label in set(labels):
        of_class = often[labels == label]
        assert of_class.max() - of_class.min() <= 1


@some
@given(long_tails, st.randoms(use_true_random=False), seeds)
def test_square_root_draws_a_class_by_the_square_root_of_its_count(counts, random, seed):
    """Checked without chance: with evenly spaced draws the shares are exact up to one draw a class."""
    labels = 2 * np.repeat(np.arange(len(counts)), counts)  # with gaps
    random.shuffle(order := list(range(len(labels))))
    labels = labels[order]

    class Even(np.random.Generator):
        def random(self, size):
            return (np.arange(size) + 0.5) / size

    drawn = square_root(labels, 20_000, Even(np.random.PCG64(seed)))
    shares = np.bincount(labels[drawn], minlength=2 * len(counts))[::2] / 20_000
    expected = np.sqrt(counts) / np.sqrt(counts).sum()
    np.testing.assert_allclose(shares, expected, atol=(max(counts) + 1) / 20_000)


@some
@given(
    long_tails,
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 99),
    st.sampled_from(list(SAMPLERS)),
)
def test_batches_of_all_processes_together_are_the_epoch(counts, share, processes, epoch, sampler):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    batch = share * processes
    if batch > len(labels):
        with pytest.raises(InputError, match="batch_size must lie in"):
            epoch_batches(sampler, labels, batch, 0, epoch)
        return
    whole = epoch_batches(sampler, labels, batch, 0, epoch)
    assert whole.shape == (len(labels) // batch, batch) and whole.min() >= 0 and whole.max() < len(labels)
    parts = [epoch_batches(sampler, labels, batch, 0, epoch, rank, processes) for rank in range(processes)]
    assert torch.equal(torch.stack(parts, dim=2).flatten(1), whole)


# ---------------------------------------------------------------- lists

# A path as lists can hold it: no control characters or white space, no parts that point elsewhere.
parts = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="/"), min_size=1).filter(
    lambda part: part not in (".", "..")
)
names = st.lists(parts, min_size=1, max_size=3).map("/".join)


@some
@given(st.lists(st.tuples(names, st.integers(0, 10**6)), min_size=1), st.sampled_from(["\n", "\r\n"]))
def test_lists_are_read_as_they_were_written(records, newline):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_bytes("".join(f"{name} {label}{newline}" for name, label in records).encode())
        assert read_list(path) == records


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(), st.text().map(lambda text: f"{text} 1\n".encode("utf-8", "surrogatepass"))))
def test_any_file_is_a_list_that_stays_in_its_folder_or_a_data_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        path.write_bytes(content)
        try:
            records = read_list(path)
        except DataError:
            return
        for name, label in records:
            assert (Path(folder) / name).resolve().is_relative_to(Path(folder).resolve()) and label >= 0


def test_a_label_of_thousands_of_digits_is_a_data_error(tmp_path):
    (tmp_path / "list.txt").write_text("a.png " + "1" * 5000)
    with pytest.raises(DataError, match="line 1: expected `path label`"):
        read_list(tmp_path / "list.txt")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), seeds)
def test_long_tail_lists_keep_the_counts_and_their_promises(counts, seed):
    counts = np.sort(counts)[::-1]
    files = [[f"{c}/{i:02}.png" for i in range(50)] for c in range(len(counts))]
    lists = long_tail_lists(files, counts, images_per_class=50)
    per_class = np.bincount([label for _, label in lists["train"]], minlength=len(counts))
    assert sorted(per_class, reverse=True) == counts.tolist()
    for split, records in lists.items():
        assert len(set(records)) == len(records)
        assert all(name.split("/")[0] == str(label) for name, label in records), split
    assert not set(lists["train"]) & set(lists["val"]) and len(lists["val"]) == 20 * len(counts)
    generator = np.random.default_rng(seed)
    assert long_tail_lists([list(generator.permutation(one)) for one in files], counts, 50) == lists


# ---------------------------------------------------------------- the feature cache

values = st.floats(-1e6, 1e6, width=32)


@st.composite
def caches(draw) -> FeatureCache:
    classes, dims = draw(st.integers(1, 6)), draw(st.integers(1, 5))

    def matrix(rows: int) -> torch.Tensor:
        return torch.from_numpy(draw(arrays.arrays(np.float32, (rows, dims), elements=values)))

    weights = matrix(classes)
    left_out = torch.tensor(draw(st.lists(st.booleans(), min_size=classes, max_size=classes)))
    weights[left_out & (torch.arange(classes) > 0)] = torch.nan
    splits, centres = {}, matrix(classes)
    counts = torch.tensor(draw(st.lists(st.integers(1, 10**6), min_size=classes, max_size=classes)))
    for split in draw(st.lists(st.sampled_from(["train", "val", "test"]), min_size=1, unique=True)):
        labels = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=6))
        labels = torch.tensor([*labels, *range(classes)] if split == "train" else labels)
        splits[split] = (matrix(len(labels)), labels)
        if split == "train":  # counts and prototypes are those of its images, each of which has a direction
            splits[split][0][~splits[split][0].any(dim=1)] = 1
            counts, centres = torch.bincount(labels), prototypes(*splits[split], classes)
    plain = st.text(st.characters(categories=["L", "N"], include_characters=" ,.;'()/&"))
    names = draw(st.lists(plain, min_size=classes, max_size=classes))
    return FeatureCache(
        weights=weights,
        scale=draw(st.floats(0.125, 1e3, width=32)),
        counts=counts,
        prototypes=centres,
        bias=matrix(classes)[:, 0] if draw(st.booleans()) else None,
        splits=splits,
        meta={"class_names": names},
    )


@some
@given(caches())
def test_a_cache_comes_back_as_it_was_saved(cache):
    with tempfile.TemporaryDirectory() as folder:
        save_cache(Path(folder), cache)
        loaded = load_cache(folder)
        assert set(loaded.splits) == set(cache.splits)
        dict(loaded.splits)  # splits are read when they are first asked for
    torch.testing.assert_close(loaded.weights, cache.weights, rtol=0, atol=0, equal_nan=True)
    for name in ("prototypes", "counts", "bias", "direction"):
        one, other = getattr(cache, name), getattr(loaded, name)
        assert (one is None and other is None) or torch.equal(one, other), name
    assert loaded.scale == cache.scale and loaded.class_names == cache.class_names
    for split, (features, labels) in cache.splits.items():
        assert torch.equal(loaded.labels(split), labels)
        step = features.abs().amax(dim=1, keepdim=True) / 127
        assert ((loaded.features(split) - features).abs() <= 0.501 * step + 1e-37).all()


def test_a_cache_of_very_many_classes_keeps_its_labels(tmp_path):
    classes = 2**15 + 1
    matrix, labels = torch.ones(classes, 1), torch.tensor([0, 2**15 - 1, 2**15])
    meta = {"class_names": [str(c) for c in range(classes)]}
    counts = torch.ones(classes, dtype=torch.int64)
    save_cache(tmp_path, FeatureCache(matrix, 16.0, counts, matrix, {"test": (matrix[:3], labels)}, meta))
    assert torch.equal(load_cache(tmp_path).labels("test"), labels)
