"""Image folders: the index made at registration, and reading by it."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.folder_index import FolderError, card, scan
from configs.wire import DatasetCard, DatasetIndex
from tests.workers.image_sets import data_config, write_folder, write_image
from workers.data import OpenedData, TrainLoader, open_data
from workers.data.corrupt import CorruptImage
from workers.data.errors import DataError, UnreadableImage
from workers.data.files import FORMATS, MAX_PIXELS, decode
from workers.data.folder import open_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with the folder `pets`: 4 training and 2 test images of each of 2 classes."""
    write_folder(tmp_path / "pets", {"train": 4, "test": 2})
    return tmp_path


# -- the index ---------------------------------------------------------------------------------------------------------
def test_the_index_lists_every_image_sorted(root: Path) -> None:
    index = scan(root, "my-pets", "pets")
    assert index.class_names == ("cat", "dog")
    test, train = index.splits
    assert (test.name, train.name) == ("test", "train")
    assert test.paths == ("cat/000.png", "cat/001.png", "dog/000.png", "dog/001.png")
    assert test.labels == (0, 0, 1, 1)
    assert train.sizes == tuple((root / "pets/train" / path).stat().st_size for path in train.paths)
    assert DatasetIndex.model_validate_json(index.model_dump_json()) == index


def test_the_card(root: Path) -> None:
    index = scan(root, "my-pets", "pets")
    made = card(index, "datasets/my-pets/x.json")
    assert (made.name, made.type, made.path, made.num_classes) == ("my-pets", "folder", "pets", 2)
    assert (made.num_examples("train"), made.num_examples("test")) == (8, 4)
    assert (made.fingerprint, made.index_key, made.note) == (index.fingerprint, "datasets/my-pets/x.json", None)


def test_the_fingerprint_depends_on_names_and_sizes_only(root: Path) -> None:
    before = scan(root, "my-pets", "pets").fingerprint
    shutil.copytree(root / "pets", root / "elsewhere" / "copied")
    os.utime(root / "elsewhere/copied/train/cat/000.png", (1, 1))
    assert scan(root / "elsewhere", "other-name", "copied").fingerprint == before
    image = root / "pets/train/cat/000.png"
    image.rename(image.with_name("zzz.png"))
    renamed = scan(root, "my-pets", "pets").fingerprint
    image.with_name("zzz.png").rename(image)
    assert scan(root, "my-pets", "pets").fingerprint == before
    image.write_bytes(image.read_bytes() + b"x")
    assert len({before, renamed, scan(root, "my-pets", "pets").fingerprint}) == 3


def test_other_files_are_left_out_and_counted(root: Path) -> None:
    for path in ("README.txt", "train/list.TXT", "train/cat/notes.json", "test/dog/._000.png", "train/dog/Thumbs"):
        (root / "pets" / path).write_text("x")
    index = scan(root, "my-pets", "pets")
    assert sum(len(split.paths) for split in index.splits) == 12
    assert index.ignored == {".txt": 2, ".json": 1, "hidden": 1, "without suffix": 1}
    assert card(index).note is not None
    assert "5 files are not images" in str(card(index).note)


def test_images_may_lie_deeper_than_their_class(root: Path) -> None:
    write_image(root / "pets/train/cat/kitten/a.JPG", np.zeros((4, 4), dtype=np.uint8))
    train = scan(root, "my-pets", "pets").splits[1]
    assert train.paths[4] == "cat/kitten/a.JPG"
    assert train.labels[4] == 0


@pytest.mark.parametrize("path", ["", "/pets", "../pets", "pets/../../x", "pets\0"])
def test_paths_that_leave_the_root_are_refused(root: Path, path: str) -> None:
    with pytest.raises(FolderError, match="below the data root"):
        scan(root, "my-pets", path)


def test_what_is_not_a_folder_is_refused(root: Path) -> None:
    with pytest.raises(FolderError, match="not a directory"):
        scan(root, "my-pets", "cars")
    (root / "empty").mkdir()
    with pytest.raises(FolderError, match="no splits"):
        scan(root, "my-pets", "empty")
    (root / "empty" / "train").mkdir()
    with pytest.raises(FolderError, match=r"split train in .* no classes"):
        scan(root, "my-pets", "empty")


def test_an_empty_class_is_refused(root: Path) -> None:
    for split in ("train", "test"):
        (root / "pets" / split / "emu").mkdir()
    with pytest.raises(FolderError, match=r"class emu of split test .* no images"):
        scan(root, "my-pets", "pets")


def test_a_class_missing_in_one_split_is_refused(root: Path) -> None:
    shutil.rmtree(root / "pets/test/dog")
    with pytest.raises(FolderError, match="class dog is not in both splits test and train"):
        scan(root, "my-pets", "pets")


def test_links_to_files_are_followed_within_the_root_only(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = root / "pets/train/cat/linked.png"
    link.symlink_to(root / "pets/train/dog/000.png")
    assert "cat/linked.png" in scan(root, "my-pets", "pets").splits[1].paths
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes(b"x")
    for target, message in ((outside, "out of the data root"), (root / "nothing.png", "link to nothing")):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(FolderError, match=message):
            scan(root, "my-pets", "pets")


def test_links_to_directories_are_refused(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (root / "pets/train/cat/again").symlink_to(root / "pets")
    with pytest.raises(FolderError, match="link to a directory"):
        scan(root, "my-pets", "pets")
    (root / "away").symlink_to(tmp_path_factory.mktemp("outside"))
    with pytest.raises(FolderError, match="link out of the data root"):
        scan(root, "my-pets", "away")


def test_names_that_are_not_utf8_are_refused(root: Path) -> None:
    (root / "pets/train/cat" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    with pytest.raises(FolderError, match="not UTF-8"):
        scan(root, "my-pets", "pets")


# -- reading by the index ----------------------------------------------------------------------------------------------
def open_pets(root: Path, index: DatasetIndex, channels: int = 3) -> OpenedData:
    data = data_config(source={"type": "folder", "name": "my-pets"})
    content = index.model_dump_json().encode()
    return open_data(data, card(index, "the-key"), root, {"the-key": content}.__getitem__, in_channels=channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_and_labels_are_those_of_the_files(root: Path, channels: int) -> None:
    opened = open_pets(root, scan(root, "my-pets", "pets"), channels)
    assert opened.class_names == ("cat", "dog")
    assert opened.train is not None
    assert opened.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert opened.train.name(5) == "dog/001.png"
    expected = np.asarray(Image.open(root / "pets/train/dog/001.png").convert("RGB" if channels == 3 else "L"))
    assert np.array_equal(opened.train.read(5).permute(1, 2, 0).numpy(), expected.reshape(8, 8, channels))


def test_a_file_that_changed_or_went_is_replaced_and_named(root: Path) -> None:
    index = scan(root, "my-pets", "pets")
    (root / "pets/train/cat/001.png").unlink()
    truncated = root / "pets/train/dog/002.png"
    truncated.write_bytes(truncated.read_bytes()[:40])
    source = open_pets(root, index).train
    assert source is not None
    told: list[CorruptImage] = []
    data = data_config(max_corrupt=0.25)
    with TrainLoader(
        source,
        data,
        (8, 8),
        seed=0,
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        on_corrupt=told.append,
    ) as loader:
        next(loader)
    errors = {corrupt.name: corrupt.error for corrupt in told}
    assert "No such file" in errors["cat/001.png"]
    assert "40 bytes, the data set's index says" in errors["dog/002.png"]


def test_a_folder_that_is_not_on_this_node_says_so(root: Path, tmp_path: Path) -> None:
    index = scan(root, "my-pets", "pets")
    shutil.rmtree(tmp_path / "pets")
    with pytest.raises(DataError, match=rf"my-pets \(test\) was not found in {tmp_path}/pets/test: copy it"):
        open_pets(root, index)


def test_bad_indexes_are_refused(root: Path) -> None:
    index = scan(root, "my-pets", "pets")
    good = card(index, "key")

    def refusal(content: bytes, of: DatasetCard = good, data_root: Path | None = root) -> str:
        with pytest.raises(DataError) as caught:
            open_folder(of, "train", data_root, lambda _: content, 3)
        return str(caught.value)

    train = index.splits[1]
    shorter = index.model_copy(update={"splits": (train.model_copy(update={"labels": train.labels[:-1]}),)})
    escaping = index.model_copy(
        update={"splits": (train.model_copy(update={"paths": ("../../x.png", *train.paths[1:])}),)}
    )
    assert "damaged" in refusal(b"{")
    assert "damaged" in refusal(shorter.model_dump_json().encode())
    assert "outside it" in refusal(escaping.model_dump_json().encode())
    assert "fingerprint" in refusal(index.model_copy(update={"fingerprint": "sha256:0"}).model_dump_json().encode())
    assert "no index" in refusal(b"", of=good.model_copy(update={"index_key": None}))
    assert "PATCHWORK_DATA_ROOT" in refusal(b"", data_root=None)


# -- decoding ----------------------------------------------------------------------------------------------------------
def encoded(mode: str, fmt: str, size: tuple[int, int] = (9, 6)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert(mode).save(buffer, fmt)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "fmt"),
    [("RGB", "PNG"), ("L", "PNG"), ("1", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"),
     ("RGB", "WEBP"), ("RGB", "BMP"), ("L", "TIFF"), ("RGB", "PPM"), ("L", "JPEG")],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_grey_or_rgb(mode: str, fmt: str, channels: int) -> None:
    assert fmt in FORMATS
    image = decode(encoded(mode, fmt), channels)
    assert image.shape == (channels, 6, 9)
    assert image.dtype == torch.uint8


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_not_an_image_is_unreadable(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(content, 3)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("fmt", FORMATS)
def test_damaged_images_are_unreadable_or_read_but_nothing_else(fmt: str) -> None:
    """Cut at every length, and with random bytes changed: never another exception."""
    content = encoded("RGB", fmt, (17, 11))
    rng = random.Random(0)
    damaged = [content[:length] for length in range(0, len(content), max(1, len(content) // 60))]
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        damaged.append(bytes(changed))
    unreadable = 0
    for one in damaged:
        try:
            assert decode(one, 3).shape[0] == 3
        except UnreadableImage:
            unreadable += 1
    assert unreadable > 20


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("factor", [1.1, 5.0], ids=["Pillow only warns", "Pillow raises"])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(factor: float) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height = int(factor * MAX_PIXELS / 8192)
    header = struct.pack(">IIBBBBB", 8192, height, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(UnreadableImage, match="pixels"):
        decode(bomb, 3)
