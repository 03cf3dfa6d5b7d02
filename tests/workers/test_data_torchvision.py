"""The torchvision sets, on tiny files in the layout of the real ones, and on the real Fashion-MNIST where it is."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.io as io
import torch
from PIL import Image
from torchvision import datasets

from configs.data import TorchvisionSource
from configs.datasets import TORCHVISION_CARDS
from tests.workers.image_sets import data_config, random_images, write_image
from workers.data import open_data
from workers.data.errors import DataError
from workers.data.source import ImageSource
from workers.data.torchvision_sets import open_torchvision

NO_DIR = Path("/nonexistent")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "fashion-mnist"


def source(name: str, download: str = "never") -> TorchvisionSource:
    return TorchvisionSource.model_validate({"type": "torchvision", "name": name, "download": download})


def open_set(name: str, split: str, root: Path | None, channels: int = 3, **options: Any) -> ImageSource:
    download = options.pop("download", "never")
    return open_torchvision(source(name, download), split, root, channels, **({"system_dir": NO_DIR} | options))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes() + array.tobytes()


def write_mnist(directory: Path, sizes: dict[str, int], zipped: bool = True) -> dict[str, np.ndarray]:
    """Write the four files with so many images in `train` and `t10k`; the images, by split prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    images = {prefix: random_images(count, 1, 28, 28, seed=count)[:, 0] for prefix, count in sizes.items()}
    for prefix, pixels in images.items():
        parts = {"images-idx3": idx(pixels), "labels-idx1": idx(np.arange(len(pixels), dtype=np.uint8) % 10)}
        for part, content in parts.items():
            path = directory / f"{prefix}-{part}-ubyte"
            if zipped:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content, 1))
            else:
                path.write_bytes(content)
    return images


# -- MNIST and Fashion-MNIST -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("FashionMNIST", "fashion-mnist"),
        ("FashionMNIST", "torchvision/FashionMNIST/raw"),
        ("MNIST", "mnist"),
        ("MNIST", "torchvision/MNIST/raw"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_is_found_where_it_may_lie(tmp_path: Path, name: str, place: str, zipped: bool) -> None:
    images = write_mnist(tmp_path / place, {"train": 20, "t10k": 12}, zipped)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        opened = open_set(name, split, tmp_path, channels=1)
        assert opened.labels.tolist() == [i % 10 for i in range(len(images[prefix]))]
        assert torch.equal(opened.read(3)[0], torch.from_numpy(images[prefix][3]))


def test_fashion_mnist_of_the_system_package_needs_no_data_root(tmp_path: Path) -> None:
    write_mnist(tmp_path / "system", {"train": 20, "t10k": 12})
    assert len(open_set("FashionMNIST", "test", None, system_dir=tmp_path / "system")) == 12


def test_the_data_root_comes_before_the_system_package(tmp_path: Path) -> None:
    write_mnist(tmp_path / "system", {"train": 20, "t10k": 12})
    write_mnist(tmp_path / "root" / "fashion-mnist", {"train": 5, "t10k": 4})
    assert len(open_set("FashionMNIST", "train", tmp_path / "root", system_dir=tmp_path / "system")) == 5


def test_grey_images_are_repeated_for_a_model_of_three_channels(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", {"train": 20, "t10k": 12})
    opened = open_set("MNIST", "train", tmp_path, channels=3)
    image = opened.read(0)
    assert image.shape == (3, 28, 28)
    assert torch.equal(image[0], image[2])
    together = opened.read_many(np.array([4, 0]))
    assert together is not None
    assert torch.equal(together[1], image)


def test_missing_fashion_mnist_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_set("FashionMNIST", "train", tmp_path)
    for part in (f"{tmp_path}/fashion-mnist", str(NO_DIR), "dataset-fashion-mnist", "data.source.download: auto"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "Flowers102", "OxfordIIITPet", "ImageNet"])
def test_without_a_data_root_it_says_how_to_set_one(name: str) -> None:
    with pytest.raises(DataError, match="PATCHWORK_DATA_ROOT"):
        open_set(name, "train", None, download="auto")


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100", "Flowers102", "OxfordIIITPet", "ImageNet"])
def test_a_missing_set_says_where_it_looked(tmp_path: Path, name: str) -> None:
    split = {"OxfordIIITPet": "trainval"}.get(name, "train")
    with pytest.raises(DataError, match=f"{name}.* not found.*{tmp_path}/"):
        open_set(name, split, tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", {"train": 20, "t10k": 12})
    path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz cannot be read .* damaged"):
        open_set("MNIST", "train", tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], "incomplete"),
        (lambda content: content + b"x", "should hold"),
        (lambda content: b"\x00\x00\x0d\x03" + content[4:], "not an idx file"),
        (lambda content: content[:7], "not an idx file"),
        (lambda _: b"", "not an idx file"),
        (lambda _: idx(np.zeros((3, 28, 28), dtype=np.uint8)), "3 images and .* 20 labels"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    write_mnist(tmp_path / "mnist", {"train": 20, "t10k": 12}, zipped=False)
    path = tmp_path / "mnist" / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_set("MNIST", "train", tmp_path)


def test_a_set_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path / "mnist", {"train": 20, "t10k": 12})
    data = data_config(source={"type": "torchvision", "name": "MNIST"})
    with pytest.raises(DataError, match=r"'test' of data set MNIST holds 12 images here and should hold 10000"):
        open_data(data, TORCHVISION_CARDS["MNIST"], tmp_path, lambda _: b"", in_channels=1)


def test_the_real_fashion_mnist() -> None:
    data = data_config(source={"type": "torchvision", "name": "FashionMNIST", "download": "never"})
    root = SHARED.parent if SHARED.is_dir() else None
    opened = open_data(data, TORCHVISION_CARDS["FashionMNIST"], root, lambda _: b"", in_channels=1)
    assert opened.train is not None
    assert np.bincount(opened.train.labels).tolist() == [6000] * 10
    assert np.bincount(opened.eval.labels).tolist() == [1000] * 10
    # The first training image is an ankle boot: dark background above, a sole in the lower right.
    assert opened.class_names is not None
    assert opened.class_names[opened.train.labels[0]] == "Ankle boot"
    boot = opened.train.read(0)[0]
    assert boot.shape == (28, 28)
    assert boot[:3].max() == 0
    assert boot[20:25, 15:27].float().mean() > 150


# -- sets that torchvision reads ---------------------------------------------------------------------------------------
def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def write_cifar(root: Path, name: str, per_file: int) -> Any:
    """Tiny files as of CIFAR; torchvision's class for them (it checks sums, so it is told those of these files)."""
    real = getattr(datasets, name)
    directory = root / real.base_folder
    directory.mkdir(parents=True)
    label_key = "labels" if name == "CIFAR10" else "fine_labels"
    sums: dict[str, list[list[str]]] = {}
    files = [(listing, name) for listing in ("train_list", "test_list") for name, _ in getattr(real, listing)]
    for number, (listing, file_name) in enumerate(files):
        pixels = random_images(per_file, 3, 32, 32, seed=number).reshape(per_file, -1)
        (directory / file_name).write_bytes(pickle.dumps({"data": pixels, label_key: [number] * per_file}))
        sums.setdefault(listing, []).append([file_name, _md5(directory / file_name)])
    meta = directory / real.meta["filename"]
    meta.write_bytes(pickle.dumps({real.meta["key"]: ["a", "b"]}))
    tiny = type(name, (real,), {**sums, "meta": {**real.meta, "md5": _md5(meta)}})
    return SimpleNamespace(**{name: tiny})


@pytest.mark.parametrize(("name", "num_train"), [("CIFAR10", 15), ("CIFAR100", 3)])
def test_cifar(tmp_path: Path, name: str, num_train: int) -> None:
    sets = write_cifar(tmp_path / "torchvision", name, per_file=3)
    train, test = (open_set(name, split, tmp_path, sets=sets) for split in ("train", "test"))
    assert (len(train), len(test)) == (num_train, 3)
    assert train.labels.tolist() == [i // 3 for i in range(num_train)]
    assert torch.equal(train.read(1), torch.from_numpy(random_images(3, 3, 32, 32, seed=0)[1]))
    assert torch.equal(test.read(2), torch.from_numpy(random_images(3, 3, 32, 32, seed=num_train // 3)[2]))


def test_colour_images_become_grey_as_pillow_makes_them(tmp_path: Path) -> None:
    sets = write_cifar(tmp_path / "torchvision", "CIFAR10", per_file=3)
    grey = open_set("CIFAR10", "train", tmp_path, channels=1, sets=sets)
    pixels = random_images(3, 3, 32, 32, seed=0)[1].transpose(1, 2, 0)
    assert np.array_equal(grey.read(1)[0].numpy(), np.asarray(Image.fromarray(pixels).convert("L")))


def test_a_damaged_cifar_is_refused(tmp_path: Path) -> None:
    sets = write_cifar(tmp_path / "torchvision", "CIFAR10", per_file=3)
    (tmp_path / "torchvision" / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"x")
    with pytest.raises(DataError, match="incomplete"):
        open_set("CIFAR10", "train", tmp_path, sets=sets)


def test_flowers(tmp_path: Path) -> None:
    directory = tmp_path / "torchvision" / "flowers-102"
    for number in range(1, 9):
        write_image(directory / "jpg" / f"image_{number:05d}.jpg", np.full((10, 14, 3), 20 * number, dtype=np.uint8))
    io.savemat(directory / "imagelabels.mat", {"labels": np.array([1, 2, 3, 1, 2, 3, 1, 2])})
    io.savemat(directory / "setid.mat", {"trnid": [2, 4, 6], "valid": [1, 3], "tstid": [5, 7, 8]})
    real = datasets.Flowers102
    files = {kind: (name, _md5(directory / name)) for kind, (name, _) in real._file_dict.items() if kind != "image"}
    sets = SimpleNamespace(Flowers102=type("Flowers102", (real,), {"_file_dict": files}))
    labels = {
        split: open_set("Flowers102", split, tmp_path, sets=sets).labels.tolist()
        for split in ("train", "val", "trainval", "test")
    }
    assert labels == {"train": [1, 0, 2], "val": [0, 2], "trainval": [1, 0, 2, 0, 2], "test": [1, 0, 1]}
    both = open_set("Flowers102", "trainval", tmp_path, sets=sets)
    assert both.read(3).shape == (3, 10, 14)
    assert abs(both.read(3).float().mean() - 20) < 2
    assert both.name(3) == "flowers-102/jpg/image_00001.jpg"


def test_pets(tmp_path: Path) -> None:
    directory = tmp_path / "torchvision" / "oxford-iiit-pet"
    (directory / "annotations").mkdir(parents=True)
    for split, names in (("trainval", ["Abyssinian_1", "beagle_7"]), ("test", ["Abyssinian_2"])):
        lines = [f"{name} {1 if name[0].isupper() else 2} 1 1" for name in names]
        (directory / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for name in names:
            write_image(directory / "images" / f"{name}.jpg", np.zeros((9, 7, 3), dtype=np.uint8))
    opened = open_set("OxfordIIITPet", "trainval", tmp_path)
    assert opened.labels.tolist() == [0, 1]
    assert opened.read(1).shape == (3, 9, 7)
    assert len(open_set("OxfordIIITPet", "test", tmp_path)) == 1


def test_imagenet(tmp_path: Path) -> None:
    directory = tmp_path / "torchvision" / "imagenet"
    for wnid, count in (("n02", 2), ("n01", 3)):
        for i in range(count):
            write_image(directory / "val" / wnid / f"{i}.JPEG", np.zeros((9, 7, 3), dtype=np.uint8))
    opened = open_set("ImageNet", "val", tmp_path, channels=1)
    assert opened.labels.tolist() == [0, 0, 0, 1, 1]
    assert opened.name(3) == "n02/0.JPEG"
    assert opened.read(3).shape == (1, 9, 7)
    with pytest.raises(DataError, match=r"extract its archive there .* never downloaded"):
        open_set("ImageNet", "train", tmp_path, download="auto")


# -- downloads ---------------------------------------------------------------------------------------------------------
class FakeMNIST:
    """Stands for torchvision.datasets.MNIST, with its files on a shelf instead of the internet."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.fetched = 0
        self._breaks_after = breaks_after

    def __call__(self, root: str, download: bool) -> None:
        assert download
        self.fetched += 1
        raw = Path(root) / "MNIST" / "raw"
        write_mnist(raw, {"train": 20})
        if self._breaks_after == self.fetched:
            raise ConnectionResetError("connection reset")
        write_mnist(raw, {"t10k": 12})


def test_a_missing_set_is_downloaded_once_if_allowed(tmp_path: Path) -> None:
    fake = FakeMNIST()
    for split, count in (("train", 20), ("test", 12)):
        opened = open_set("MNIST", split, tmp_path, download="auto", sets=SimpleNamespace(MNIST=fake))
        assert len(opened) == count
    assert fake.fetched == 1


def test_a_download_cut_short_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    fake = FakeMNIST(breaks_after=1)
    sets = SimpleNamespace(MNIST=fake)
    with pytest.raises(DataError, match=r"could not be downloaded \(ConnectionResetError: connection reset\)"):
        open_set("MNIST", "train", tmp_path, download="auto", sets=sets)
    with pytest.raises(DataError, match="not found"):
        open_set("MNIST", "train", tmp_path, sets=sets)
    assert len(open_set("MNIST", "test", tmp_path, download="auto", sets=sets)) == 12


def test_ranks_that_start_together_download_once(tmp_path: Path) -> None:
    fake = FakeMNIST()
    lengths: list[int] = []

    def rank() -> None:
        opened = open_set("MNIST", "train", tmp_path, download="auto", sets=SimpleNamespace(MNIST=fake))
        lengths.append(len(opened))

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert lengths == [20] * 4
    assert fake.fetched == 1
