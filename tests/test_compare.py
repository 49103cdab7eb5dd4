"""Own predictions as a row of Table 1, on made-up caches."""

from __future__ import annotations

import numpy as np
import pytest
from study import study  # noqa: F401

from lt_core import cli, compare
from lt_core.checks import DataError, InputError
from lt_core.classifiers import predict
from lt_core.results import difference, estimates, measure
from lt_core.tables import Row


@pytest.fixture
def table1(study, monkeypatch):  # noqa: F811
    """Table 1 in small, on made-up caches of three seeds (of `lade`: one)."""
    rows = [
        Row("Ours* / Cosine", "sqrt/cosine"),
        Row("Ours* / ensemble", "sqrt/ensemble"),
        Row("LADE", "lade/own"),
    ]
    monkeypatch.setattr(compare, "printed_rows", lambda table: rows)
    profile = type("Profile", (), {"backbone": lambda self, name: type("B", (), {"role": "imagenet_lt"})})
    monkeypatch.setattr(compare, "load_profile", lambda name: profile())
    return study


def written(folder, seeds=(0, 1, 2), **more):
    """Files of predictions: those of the ensemble, one for each seed."""
    files = []
    for seed in seeds:
        from lt_core.results import load

        file = folder / f"{seed}.npz"
        np.savez(file, predictions=predict(load("made_up", "sqrt", seed), "ensemble"), **more)
        files.append(file)
    return files


def of(files, name="mine"):
    return compare.own_values(files, "made_up", "sqrt", name)


def test_predictions_of_a_known_classifier_are_its_row(table1, tmp_path):
    values = of(written(tmp_path))
    known = measure("made_up", ["sqrt/ensemble", "sqrt/cosine"])
    assert (values.loc["mine"].to_numpy() == known.loc["sqrt/ensemble"].to_numpy()).all()

    table = compare.compare(values, "made_up", "sqrt", "mine")
    mine, ensemble = table.loc["mine"], table.loc["Parisot et al., re-run here / ensemble"]
    assert (mine["accuracy"] == ensemble["accuracy"]).all()
    assert set(ensemble["difference"]) == {"+0.0 [+0.0, +0.0]"}
    paired = estimates(difference(known, "sqrt/ensemble", "sqrt/cosine")).loc["few"]
    expected = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*paired)
    assert table.loc["Parisot et al., re-run here / Cosine", ("difference", "few")] == expected
    assert mine["difference"].isna().all()


def test_scores_and_plain_arrays_are_read(table1, tmp_path):
    (file,) = written(tmp_path, [0])
    classes = np.load(file)["predictions"]
    np.savez(tmp_path / "scores.npz", scores=np.eye(6)[classes])
    np.save(tmp_path / "plain.npy", classes)
    for other in ("scores.npz", "plain.npy"):
        assert (of([tmp_path / other]).to_numpy() == of([file]).to_numpy()).all()


def test_a_stated_seed_counts(table1, tmp_path):
    (file,) = written(tmp_path, [2], seed=2)
    table = compare.compare(of([file]), "made_up", "sqrt", "mine")
    assert set(table.loc["Parisot et al., re-run here / Cosine", "difference"].notna()) == {True}
    assert table.loc["LADE", "difference"].isna().all()  # it has seed 0 alone


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"predictions": np.zeros(179, int)}, "must have 180 entries, found 179"),
        ({"predictions": np.full(180, 6)}, "must lie in 0..5, found 6"),
        ({"predictions": np.zeros(180)}, "must be integers"),
        ({"scores": np.zeros((180, 5))}, "must have 6 columns"),
        ({"scores": np.full((180, 6), np.nan)}, "NaN"),
        ({"classes": np.zeros(180, int)}, "must hold either"),
        ({"predictions": np.zeros(180, int), "scores": np.zeros((180, 6))}, "must hold either"),
        ({"predictions": np.zeros(180, int), "seed": 7}, "no row has a training seed of mine \\(7\\)"),
    ],
)
def test_what_does_not_fit_is_refused(table1, tmp_path, arrays, message):
    np.savez(tmp_path / "mine.npz", **arrays)
    with pytest.raises(InputError, match=message):
        compare.compare(of([tmp_path / "mine.npz"]), "made_up", "sqrt", "mine")


def test_other_files_and_too_many_are_refused(table1, tmp_path):
    (tmp_path / "text.npz").write_text("not an array")
    with pytest.raises(DataError, match="cannot be read"):
        of([tmp_path / "text.npz"])
    files = written(tmp_path)
    with pytest.raises(InputError, match="3 training seeds, but there are 4 files"):
        of([*files, files[0]])
    (twice,) = written(tmp_path, [1], seed=0)
    with pytest.raises(InputError, match="same training seed"):
        of([files[0], twice])


def test_the_command(table1, tmp_path, capsys):
    files = list(map(str, written(tmp_path)))
    words = ["compare", "--profile", "made_up", "--backbone", "sqrt", "--name", "my method"]
    assert cli.main([*words, "--predictions", *files, "--out", str(tmp_path / "t.csv")]) == 0
    assert "my method less the row" in capsys.readouterr().out
    assert "my method" in (tmp_path / "t.csv").read_text()
    np.savez(tmp_path / "short.npz", predictions=np.zeros(3, int))
    assert cli.main([*words, "--predictions", str(tmp_path / "short.npz")]) == cli.EXIT_BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
