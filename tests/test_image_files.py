"""Images in files: the same pixels whatever decodes them, and errors that name the file."""

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from lt_core.checks import DataError, InputError, TrainingError
from lt_core.data import image_files
from lt_core.data.augmentation import draw_jitter
from lt_core.data.datasets import decode
from lt_core.data.image_files import (
    SQUARE,
    Crops,
    ImageFiles,
    Square,
    decode_smaller,
    evaluation_batches,
    random_box,
    random_jitter,
    training_batches,
)
from lt_core.data.profiles import Augmentation, Recipe
from lt_core.samplers import epoch_batches

AUGMENTATION = Augmentation(random_resized_crop=0.08, flip=True, colour_jitter=0.4)
RECIPE = Recipe(
    epochs=1,
    batch_size=8,
    learning_rate=0.1,
    classifier_learning_rate=0.1,
    input_size=24,
    augmentation=AUGMENTATION,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ImageFiles:
    """24 smooth JPEGs of different sizes."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(24):
        small = generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((60 + number, 40 + 2 * number), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=95)
    return ImageFiles(folder, np.array([f"{number}.jpg" for number in range(24)]))


def machine(rank: int = 0, world_size: int = 1, workers: int = 0) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world_size, workers=workers)


def epoch(files: ImageFiles, rank: int = 0, world_size: int = 1, first: int = 0, **options: object) -> list:
    batches = epoch_batches("uniform", torch.zeros(24, dtype=torch.int64), 8, 0, 0, rank, world_size)
    place = machine(rank=rank, world_size=world_size, **options)
    return list(training_batches(files, [(0, first, batches)], RECIPE, 0, place))


def test_pixels_do_not_depend_on_workers_processes_or_where_an_epoch_is_resumed(files):
    torch.manual_seed(1)
    alone = epoch(files)
    assert [batch.shape for batch in alone] == [(8, 3, 24, 24)] * 3
    assert alone[0].is_contiguous(memory_format=torch.channels_last) and alone[0].min() >= 0
    torch.manual_seed(2)  # the global generator plays no part ...
    state = torch.get_rng_state()
    again, resumed = epoch(files, workers=1), epoch(files, first=1)
    assert torch.equal(state, torch.get_rng_state())  # ... and is left alone
    for one, two in zip(alone, again, strict=True):
        assert torch.equal(one, two)
    for one, two in zip(alone[1:], resumed, strict=True):
        assert torch.equal(one, two)
    shares = [epoch(files, rank, 2) for rank in range(2)]
    for step, batch in enumerate(alone):
        for rank in range(2):
            assert torch.equal(batch[rank::2], shares[rank][step])


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_make_whole_batches_in_order(files, monkeypatch, workers):
    """However small the pieces, and over several epochs, of which the first is resumed."""
    batches = epoch_batches("uniform", torch.zeros(24, dtype=torch.int64), 8, 0, 0)
    epochs = [(0, 2, batches), (1, 0, batches), (2, 0, batches[:, :5])]
    expected = [b for one in epochs for b in training_batches(files, [one], RECIPE, 0, machine(), views=2)]
    monkeypatch.setattr(image_files, "PIECE", 3)
    found = list(training_batches(files, epochs, RECIPE, 0, machine(workers=workers), views=2))
    assert [len(batch) for batch in found] == [16] * 4 + [10] * 3
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one, two)
    (test_images,) = evaluation_batches(files, 24, machine(workers=workers))
    assert len(test_images) == 24


def test_too_little_shared_memory_is_named_with_its_remedy(files, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(image_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(TrainingError, match=r"^100 workers need 28 MB in /dev/shm, .* 1 MB .*--shm-size"):
        next(evaluation_batches(files, 24, machine(workers=100)))
    assert next(evaluation_batches(files, 24, machine())).shape == (24, 3, 24, 24)  # no worker, no need


def test_a_worker_that_is_killed_ends_the_run_in_one_line(files, monkeypatch):
    read = image_files.Crops.__getitem__

    def dying(crops: image_files.Crops, crop: image_files.Crop) -> object:
        if crop[0] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(crops, crop)

    monkeypatch.setattr(image_files.Crops, "__getitem__", dying)
    with pytest.raises(TrainingError, match=r"^a process that decodes images was ended [^\n]*--workers N"):
        list(evaluation_batches(files, 24, machine(workers=1)))


@pytest.mark.parametrize("size", [(500, 375), (90, 160), (400, 60), (60, 400)])
def test_boxes_are_those_of_torchvision(size):
    """The same distribution of sides and corners; what is too narrow for any box is cut as there."""
    from torchvision.transforms import RandomResizedCrop

    image, draws = Image.new("L", size), 1500
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.3, 1.0], [3 / 4, 4 / 3]) for _ in range(draws)])
    ours = np.array([random_box(size, 0.3, np.random.default_rng([0, draw])) for draw in range(draws)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    areas = ours[:, 2:].prod(1) / (size[0] * size[1])
    assert ks_2samp(areas, theirs[:, 2:].prod(1) / (size[0] * size[1])).pvalue > 1e-3


@pytest.mark.parametrize(
    "how",
    [
        Augmentation(colour_jitter=0.4),
        Augmentation(colour_jitter=0.4, hue=0.1, jitter_share=0.8, grey=0.2),
    ],
)
def test_colours_of_files_change_as_those_of_a_batch(how):
    batch = draw_jitter(2000, how, torch.Generator().manual_seed(0)).numpy()
    ours = np.array([random_jitter(how, np.random.default_rng([0, draw])) for draw in range(2000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], batch[:, column]).pvalue > 1e-3
    untouched = [(one[:, [0, 1, 3]] == [1, 1, 0]).all(1).mean() for one in (ours, batch)]
    assert untouched == pytest.approx([1 - how.jitter_share] * 2, abs=0.04)


def test_two_views_differ_and_colours_change(files):
    batches = torch.arange(4)[None]
    (pixels,) = training_batches(files, [(0, 0, batches)], RECIPE, 0, machine(), views=2)
    assert pixels.shape == (8, 3, 24, 24)
    assert (pixels[:4] - pixels[4:]).abs().mean() > 5
    grey = RECIPE.model_copy(update={"augmentation": AUGMENTATION.model_copy(update={"grey": 1.0})})
    (pixels,) = training_batches(files, [(0, 0, batches)], grey, 0, machine())
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2], atol=0.01, rtol=0)


def test_several_threads_make_the_same_crops(files, monkeypatch):
    rows = [(row, (0, 0, row, 0)) for row in range(24)]
    crops = Crops(files, 24, AUGMENTATION)
    alone, together = [], []
    for threads, found in ((1, alone), (3, together)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found += crops.__getitems__(rows)
    assert all(map(torch.equal, sum(alone, ()), sum(together, ())))
    crops.files = ImageFiles(files.folder, np.array(["0.jpg"] * 23 + ["none.jpg"]))
    with pytest.raises(DataError, match="none.jpg .* not a readable image"):
        crops.__getitems__(rows)


def test_a_test_image_is_its_central_square(files):
    (pixels,) = evaluation_batches(files, 24, machine())
    assert len(pixels) == 24
    with Image.open(files.folder / "3.jpg") as image:
        top, left, height, width = SQUARE.box(image.size)
        assert (width, height) == (0.875 * 46, 0.875 * 46)
        corners = (left, top, left + width, top + height)
        expected = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=corners))
    assert torch.equal(pixels[3].permute(1, 2, 0), torch.from_numpy(expected.copy()).float())

    # Of a network that was made for another
    square = Square(1.0, "bicubic")
    other = next(evaluation_batches(files, 24, machine(), square=square))
    with Image.open(files.folder / "3.jpg") as image:
        expected = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC, box=(8.5, 0, 54.5, 46)))
        assert (image.height, square.box(image.size)) == (46, (0, (image.width - 46) / 2, 46, 46))
    assert torch.equal(other[3].permute(1, 2, 0), torch.from_numpy(expected.copy()).float())
    assert torch.equal(other[3], files.pixels(3, 24, square).float())


def test_large_photographs_are_decoded_smaller_and_look_the_same(tmp_path):
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    photograph = Image.fromarray(coarse).resize((1601, 1203), Image.Resampling.BICUBIC)
    photograph.save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        assert decode_smaller(image, 100 / 1203) == 1 / 4
        top, left, height, width = SQUARE.box(photograph.size)
        corners = (left, top, left + width, top + height)
    with Image.open(tmp_path / "a.jpg") as image:
        whole = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR, box=corners)).astype(float)
    found = ImageFiles(tmp_path, np.array(["a.jpg"])).pixels(0, 64).permute(1, 2, 0).numpy()
    assert np.abs(found - whole).mean() < 0.5 and np.abs(found - whole).max() <= 4
    held = decode((tmp_path / "a.jpg").read_bytes(), 64).astype(float)
    expected = np.asarray(photograph.resize((85, 64), Image.Resampling.BICUBIC).crop((10, 0, 74, 64)))
    assert np.abs(held - expected).mean() < 1

    photograph.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:  # formats that cannot
        assert decode_smaller(image, 0.05) == 1


def test_other_formats_and_colours_are_decoded(tmp_path):
    """ImageNet has a PNG and CMYK files under .JPEG names."""
    red = Image.new("RGB", (40, 40), (200, 30, 30))
    red.save(tmp_path / "a.JPEG", "PNG")
    red.convert("CMYK").save(tmp_path / "b.JPEG", "JPEG", quality=95)
    red.convert("L").save(tmp_path / "c.JPEG", "JPEG")
    red.save(tmp_path / "d.JPEG", "JPEG", quality=95)
    files = ImageFiles(tmp_path, np.array(["a.JPEG", "b.JPEG", "c.JPEG", "d.JPEG"]))
    (pixels,) = evaluation_batches(files, 24, machine())
    for row in (0, 1, 3):
        assert (pixels[row].mean((1, 2)) - torch.tensor([200.0, 30, 30])).abs().max() < 6
    assert torch.equal(pixels[2, 0], pixels[2, 1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_or_missing_file_is_named_in_one_sentence(files, tmp_path, workers):
    (tmp_path / "half.jpg").write_bytes((files.folder / "0.jpg").read_bytes()[:300])
    for name in ("half.jpg", "none.jpg"):
        broken = ImageFiles(tmp_path, np.array([name]))
        with pytest.raises(DataError, match=rf"^{name} in .* is not a readable image: [^\n]*$"):
            list(evaluation_batches(broken, 24, machine(workers=workers)))
        with pytest.raises(DataError, match=rf"^{name} in "):
            broken.check(10)


def test_what_files_cannot_do_is_refused(files):
    with pytest.raises(InputError, match="need an input_size"):
        Crops(files, 0)
    with pytest.raises(InputError, match="crop_padding is for images in memory"):
        Crops(files, 24, Augmentation(crop_padding=4))


def test_rows_are_selected_as_those_of_a_tensor(files):
    assert files[slice(1, None, 2)].names.tolist() == files.names[1::2].tolist()
    assert len(files[torch.arange(24) > 20]) == 3


def test_a_crop_without_a_key_changes_nothing(files):
    pixels, jitter = Crops(files, 24)[0, None]
    assert pixels.dtype == torch.uint8 and pixels.shape == (24, 24, 3) and jitter.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_images_of_16_bits_are_scaled_and_not_clipped(tmp_path, form):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(64, 0)
    Image.fromarray(ramp).save(tmp_path / f"a.{form}", form)
    expected = np.round(ramp[0] / 257)
    assert np.array_equal(decode((tmp_path / f"a.{form}").read_bytes(), 64)[0, :, 0], expected)
    pixels = ImageFiles(tmp_path, np.array([f"a.{form}"])).pixels(0, 64)
    assert pixels[0, 0].min() > 10 and pixels[0, 0].max() < 245  # the central square of the ramp


def test_images_of_32_bits_are_refused_by_name(tmp_path):
    for kind in (np.int32, np.float32):
        Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "a.tif")
        with pytest.raises(DataError, match="a.tif .* 32 bits"):
            ImageFiles(tmp_path, np.array(["a.tif"])).pixels(0, 8)
