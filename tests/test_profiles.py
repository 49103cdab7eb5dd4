"""Profiles are typed data: what they say, and that everything unknown, mistyped or unused is refused."""

import pytest

from lt_core.checks import ProfileError
from lt_core.data.profiles import FOLDER, load_profile, profile_names, read_profile
from lt_core.models import BACKBONES
from lt_core.samplers import SAMPLERS

VALID = (FOLDER / "digits.toml").read_text(encoding="utf-8")


def test_known_profiles():
    assert set(profile_names()) >= {"embedded", "digits", "small"}
    for name in profile_names():
        profile = load_profile(name)
        assert profile.name == name and profile.description
        needed = {"sqrt"} if name == "inaturalist" else {"sqrt", "continual", "imagenet_frozen"}
        assert needed <= set(profile.backbones)
        for backbone in profile.backbones.values():
            assert backbone.network in {*BACKBONES, "timm:resnet50"} and backbone.sampler in SAMPLERS


def test_embedded_is_small_without_training():
    embedded, small = load_profile("embedded"), load_profile("small")
    assert embedded.recipes == small.recipes and embedded.backbones == small.backbones
    assert not embedded.trains and small.trains


def test_the_default_backbone_is_the_papers():
    sqrt = load_profile("small").backbone("sqrt")
    assert (sqrt.sampler, sqrt.classifier, sqrt.loss) == ("square_root", "cosine", "cross_entropy")
    assert load_profile("small").recipes[sqrt.recipe].warmup_epochs == 0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs = 30", "epochs = 30\nmomemtum = 0.9", r"recipes.from_scratch.momemtum: Extra inputs"),
        ("epochs = 30", "epochs = 0", "recipes.from_scratch.epochs: .*greater than or equal to 1"),
        ("epochs = 30", 'epochs = "30"', "recipes.from_scratch.epochs: .*valid integer"),
        ("epochs = 30\n", "", "recipes.from_scratch.epochs: Field required"),
        ("learning_rate = 0.1", "learning_rate = -0.1", "learning_rate: .*greater than or equal to 0"),
        ('role = "imagenet_lt"', 'role = "imagenet"', "backbones.sqrt.role"),
        ('recipe = "from_scratch"', 'recipe = "fast"', "unknown recipe 'fast': choose one of .*from_scratch"),
        ('start = "simclr"', 'start = "words"', "unknown start 'words'"),
        ('start = "simclr"\n', "", "pretraining 'simclr' is used by no backbone: remove it"),
        ('recipe = "head_only"', 'recipe = "from_scratch"', "recipe 'head_only' is used by no backbone"),
        ('places_lt = "digits"', "", "must name imagenet_lt and places_lt"),
        ("trains = true", "trains = true\n[", "digits.toml"),
        ("epochs = 30", "epochs = 100000000000000000000000", "epochs: .*less than or equal to 1000000"),
        ("epochs = 30", "epochs = 30\ninput_size = 1000000", "input_size: .*less than or equal to 4096"),
        ("[backbones.uniform]", '[backbones."../../uniform"]', "cannot name a folder"),
        ('dataset = "letters"', 'dataset = "../letters"', "dataset: .*cannot name a folder"),
        ('imagenet_lt = "digits"', 'imagenet_lt = "/digits"', "imagenet_lt: .*cannot name a folder"),
        ("trains = true", "trains = true\naliases = 3", "aliases: .*valid dictionary"),
        ("trains = true", 'trains = true\nsame_as = "../paper"', "unknown profile '../paper'"),
        ("trains = true", f"trains = true\nx = {'[' * 10**5}", "digits.toml: "),
        (
            'sampler = "uniform"\n\n[backbones.class_aware]',
            'sampler = "uniform"\nseeds = [18446744073709551616]\n\n[backbones.class_aware]',
            "less than 4294967296",
        ),
        (
            'classifier = "causal_norm"',
            'classifier = "causal_norm"\nfeature_dims = 8',
            "feature_dims must be 0",
        ),
        (
            'scale = 30.0, deferred_until = 0.8 }\nclassifier = "cosine_fixed"\n\n[backbones.rsg]',
            "scale = 30.0, deferred_until = 0.8 }\n\n[backbones.rsg]",
            "loss 'ldam_drw' takes margins off cosines: classifier must be cosine_fixed",
        ),
        (
            "{ strength = 0.05, penalty = 0.5 }",
            "{ strength = 0.05 }",
            "loss_options lack or must not have penalty",
        ),
        (
            '[backbones.places_rsg]\nrole = "places_lt"\nnetwork = "digits_net"\nrecipe = "fine_tuned"',
            '[backbones.places_rsg]\nrole = "places_lt"\nnetwork = "digits_net"\nrecipe = "head_only"',
            "backbone 'places_rsg': rsg trains the last stage, so it cannot be frozen",
        ),
    ],
)
def test_wrong_profiles_are_refused(tmp_path, old, new, message):
    assert old in VALID
    path = tmp_path / "digits.toml"
    path.write_text(VALID.replace(old, new), encoding="utf-8")
    with pytest.raises(ProfileError, match=message):
        read_profile(path)


def test_unknown_profile_lists_the_known_ones():
    with pytest.raises(
        ProfileError,
        match="unknown profile 'big': choose one of balanced, bfloat16, digits, double, embedded, half, "
        "inaturalist, paper, small, weight_decay",
    ):
        load_profile("big")


def test_the_paper_profile_has_the_papers_recipes():
    paper = load_profile("paper")
    scratch, deep = paper.recipes["from_scratch"], paper.recipes["fine_tuned_deep"]
    assert (scratch.epochs, scratch.batch_size, scratch.learning_rate) == (90, 512, 0.2)
    assert (deep.epochs, deep.batch_size, deep.learning_rate) == (10, 128, 0.001)
    assert paper.recipes["fine_tuned"].epochs == 15
    assert all(recipe.weight_decay == 5e-4 and recipe.momentum == 0.9 for recipe in paper.recipes.values())
    assert {b.network for b in paper.backbones.values() if b.role == "imagenet_lt"} == {"resnext50_32x4d"}
    assert set(load_profile("digits").backbones) <= set(paper.backbones)


def test_an_alias_is_the_backbone_that_it_names():
    paper = load_profile("paper")
    assert paper.backbone("supervised_sqrt") == paper.backbone("imagenet_sqrt")
    assert paper.trained_as("supervised_sqrt") == "imagenet_sqrt" and paper.trained_as("sqrt") == "sqrt"


def test_a_profile_of_ones_own_changes_single_values_of_another(tmp_path):
    path = tmp_path / "short.toml"
    path.write_text('same_as = "paper"\nrecipes.from_scratch.epochs = 1\n', encoding="utf-8")
    short, paper = load_profile(str(path)), load_profile("paper")
    assert short.name == "short" and short.backbones == paper.backbones
    assert short.recipes["from_scratch"] == paper.recipes["from_scratch"].model_copy(update={"epochs": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("paper.toml", 'same_as = "paper"', "paper is a profile of this repository, give it another name"),
        ("a.toml", 'same_as = "paper"\naliases.x = "y"', "unknown backbone of alias x 'y': choose one of"),
        ("b.toml", 'same_as = "nothing"', "b.toml: unknown profile 'nothing'"),
    ],
)
def test_wrong_profiles_of_ones_own_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ProfileError, match=message):
        load_profile(str(tmp_path / name))
    with pytest.raises(ProfileError, match=r"absent.toml"):
        load_profile(str(tmp_path / "absent.toml"))
