"""Splits, batches, synthetic images, and CIFAR-10 on disk: extracted, as an archive, damaged."""

import fcntl
import gzip
import hashlib
import http.server
import os
import pickle
import tarfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from common import UserError, cifar10, data
from common.transforms import reference_transform

CPU = torch.device("cpu")


def load(name="synthetic", root="nowhere", **changes):
    settings = {"test_name": "same", "train_size": 100, "test_size": 20, "seed": 0, "device": CPU}
    return data.load(name, str(root), **(settings | changes))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder with a tiny CIFAR-10 of 20 images per file; torchvision expects its md5."""
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def listed(files):
        for name, _ in files:
            content = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": [0] * 20}
            (folder / name).write_bytes(pickle.dumps(content))
        return [[name, md5(folder / name)] for name, _ in files]

    monkeypatch.setattr(CIFAR10, "train_list", listed(CIFAR10.train_list))
    monkeypatch.setattr(CIFAR10, "test_list", listed(CIFAR10.test_list))
    meta = folder / CIFAR10.meta["filename"]
    meta.write_bytes(pickle.dumps({"label_names": []}))
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(meta)})
    archive = tmp_path.parent / f"{tmp_path.name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    return tmp_path


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def archive_instead_of_folder(root):
    archive = root.parent / f"{root.name}.tar.gz"
    for path in (root / CIFAR10.base_folder).iterdir():
        path.unlink()
    (root / CIFAR10.base_folder).rmdir()
    return archive.rename(root / CIFAR10.filename)


def test_validation_split_is_a_tenth_chosen_by_seed():
    first, again, other = load(), load(), load(seed=1)
    assert (len(first.train.images), len(first.val.images), len(first.test.images)) == (90, 10, 20)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.val.images, other.val.images)
    rows = torch.cat([split.images for split in first[2:]]).flatten(1)
    assert len(rows.unique(dim=0)) == 120  # no image is in two splits


def test_targets_equal_reference_transform():
    loaded = load()
    for split in (loaded.train, loaded.val, loaded.test):
        assert torch.equal(split.targets, reference_transform(split.images))


def test_epoch_has_every_image_once_and_can_start_at_any_batch():
    split = load().train
    whole = list(data.batches(split, 32, seed=0, epoch=1))
    assert [len(images) for images, _ in whole] == [32, 32, 26]
    images = torch.cat([images for images, _ in whole])
    expected = split.images.float().mul_(1 / 255)
    assert torch.equal(images.flatten(1).unique(dim=0), expected.flatten(1).unique(dim=0))
    for image, target in whole:
        torch.testing.assert_close(reference_transform(image), target, atol=1e-6, rtol=0)
    rest = list(data.batches(split, 32, seed=0, epoch=1, start=2))
    assert torch.equal(rest[0][0], whole[2][0])
    other = next(data.batches(split, 32, seed=0, epoch=2))
    assert not torch.equal(other[0], whole[0][0])


def test_synthetic_images_have_natural_second_order_statistics():
    images = data.synthetic(500, seed=3)
    assert torch.equal(images, data.synthetic(500, seed=3))
    assert not torch.equal(images, data.synthetic(500, seed=4))
    assert images.shape == (500, 3, 32, 32)
    assert images.dtype == torch.uint8
    x = images.double() / 255
    red, green = (x[:, i].flatten() for i in (0, 1))
    assert torch.corrcoef(torch.stack([red, green]))[0, 1] > 0.8
    spectrum = torch.fft.rfft2(x.mean(1)).abs().mean(0)
    slope = (spectrum[0, 2] / spectrum[0, 8]).log2() / 2  # over two octaves
    assert 0.7 < slope < 1.3


def test_synthetic_images_beyond_memory_are_refused():
    with pytest.raises(UserError, match="do not fit into memory: ask for fewer"):
        data.synthetic(2**40, seed=0)


def test_auto_uses_cifar10_if_on_disk(cifar, tmp_path_factory, capsys, monkeypatch):
    assert load("auto", cifar, test_size=None).name == "cifar10"
    assert capsys.readouterr().err == ""
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    assert load("auto", "data").name == "synthetic"
    assert capsys.readouterr().err.count("warning: data holds no CIFAR-10") == 1


@pytest.mark.parametrize("name", ["auto", "cifar10"])
@pytest.mark.parametrize("place", ["inside", "beside", "above"])
def test_wrong_data_dir_error_names_the_right_folder(cifar, name, place):
    (cifar / "sub").mkdir()
    root = {
        "inside": cifar / CIFAR10.base_folder,
        "beside": cifar.parent / "mistyped",
        "above": cifar / "sub",
    }[place]
    with pytest.raises(UserError, match=f"{root} holds no CIFAR-10; .* does"):
        load(name, root)


def test_missing_data_dir_does_not_fall_back_to_synthetic(tmp_path):
    root = tmp_path / "a" / "b" / "nowhere"
    with pytest.raises(UserError, match="no such folder; name the folder"):
        load("auto", root)
    assert load("synthetic", root).name == "synthetic"


@pytest.mark.parametrize("name", ["auto", "cifar10"])
@pytest.mark.parametrize("place", ["mistyped", "secret/data", "x" * 300])
def test_folder_that_cannot_be_looked_into_holds_nothing(tmp_path, monkeypatch, name, place):
    """Beside or above --data-dir, or a name that is too long; root may look into every folder."""
    (tmp_path / "secret").mkdir()
    real = os.stat

    def stat(path, *args, **settings):
        if str(path).startswith(f"{tmp_path}/secret/"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **settings)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError, match="no such folder"):
        load(name, tmp_path / place)


def test_recompressed_archive_is_read(cifar):
    expected = cifar10.cifar10(cifar, train=False)
    archive = archive_instead_of_folder(cifar)
    archive.write_bytes(gzip.compress(gzip.decompress(archive.read_bytes()), 1))
    assert torch.equal(cifar10.cifar10(cifar, train=False), expected)


def test_folder_and_archive_give_the_same_images(cifar):
    folder = cifar10.cifar10(cifar, train=True)
    assert folder.shape == (100, 3, 32, 32)
    archive_instead_of_folder(cifar)
    assert torch.equal(cifar10.cifar10(cifar, train=True), folder)


@pytest.mark.parametrize("name", ["auto", "cifar10"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_file_is_named(cifar, name, damage, file):
    path = cifar / CIFAR10.base_folder / file
    expected, content = md5(path), path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-10] if damage == "cut" else content[:-1] + b"x")
    with pytest.raises(UserError) as error:
        load(name, cifar)
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert damage == "missing" or md5(path) in str(error.value)


def test_file_replaced_while_reading_is_detected(cifar, monkeypatch):
    class Replaced(CIFAR10):
        def _check_integrity(self):
            whole = super()._check_integrity()
            path = cifar / CIFAR10.base_folder / "data_batch_2"
            content = pickle.dumps({"data": np.zeros((20, 3072), np.uint8), "labels": [0] * 20})
            path.with_suffix(".new").write_bytes(content)
            path.with_suffix(".new").replace(path)
            return whole

    monkeypatch.setattr(cifar10, "CIFAR10", Replaced)
    with pytest.raises(UserError, match=r"data_batch_2|changed while it was read"):
        load("cifar10", cifar)


def test_damaged_archive_is_named(cifar):
    archive = archive_instead_of_folder(cifar)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is damaged"):
        load("auto", cifar)


def test_train_size_above_50000_is_refused(cifar):
    with pytest.raises(UserError, match="50000 training images, not 50001"):
        load("cifar10", cifar, train_size=50_001)


def test_folder_that_is_a_loop_of_links_is_refused(tmp_path):
    loop = tmp_path / "a" / "b" / "loop"
    loop.parent.mkdir(parents=True)
    loop.symlink_to(loop)
    for name in ("auto", "cifar10"):
        with pytest.raises(UserError, match=str(loop)):
            load(name, loop)


@pytest.fixture
def server(tmp_path_factory):
    """A local web server; `server.delay`: seconds to sleep before each 1,000 bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            try:
                for i in range(0, len(web.content), 1000):
                    time.sleep(web.delay)
                    self.wfile.write(web.content[i : i + 1000])
                    self.wfile.flush()
            except OSError:  # the client closed the connection, as expected
                pass

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.delay = 0
    threading.Thread(target=web.serve_forever, daemon=True).start()
    yield web
    web.shutdown()


def test_download(cifar, server, tmp_path_factory, monkeypatch):
    expected = cifar10.cifar10(cifar, train=False)
    server.content = archive_instead_of_folder(cifar).read_bytes()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/x")
    root = tmp_path_factory.mktemp("a") / "b" / "fresh"  # not beside a CIFAR-10
    root.mkdir(parents=True)
    assert torch.equal(cifar10.cifar10(root, train=False), expected)


@pytest.mark.parametrize("step", ["extract", "download"])
def test_two_runs_share_one_download_and_one_extraction(
    cifar, server, tmp_path_factory, monkeypatch, step
):
    """The second run starts in the middle of the first one's step, which then waits until the
    second one has come to its lock."""
    expected = cifar10.cifar10(cifar, train=False)
    archive = archive_instead_of_folder(cifar)
    server.content = archive.read_bytes()
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/x")
    root = tmp_path_factory.mktemp("fresh") if step == "download" else cifar
    owner, call = (tarfile, "open") if step == "extract" else (urllib.request, "urlopen")
    real, lock = getattr(owner, call), fcntl.flock
    begun, second, second_is_there = [], [], threading.Event()

    def begin(*args, **settings):
        begun.append(1)
        if len(begun) == 1:
            second.append(pool.submit(cifar10.cifar10, root, train=False))
            assert second_is_there.wait(60)
        second_is_there.set()
        return real(*args, **settings)

    def flock(*args):
        if begun:
            second_is_there.set()
        lock(*args)

    monkeypatch.setattr(owner, call, begin)
    monkeypatch.setattr(fcntl, "flock", flock)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(cifar10.cifar10(root, train=False), expected)
        assert torch.equal(second[0].result(), expected)
    assert len(begun) == 1
    assert {path.name for path in root.iterdir()} == {CIFAR10.base_folder, CIFAR10.filename}


@pytest.mark.parametrize("fault", ["slow", "wrong", "refused", "no folder"])
def test_failed_download_says_what_to_do(cifar, server, tmp_path_factory, monkeypatch, fault):
    content = archive_instead_of_folder(cifar).read_bytes()
    server.content = content[:-1] if fault == "wrong" else content
    server.delay = 0.2 if fault == "slow" else 0
    port = 9 if fault == "refused" else server.server_port  # nothing listens on 9
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/x")
    monkeypatch.setattr(cifar10, "DOWNLOAD_LIMIT_S", 0.5)
    root = tmp_path_factory.mktemp("a") / "b" / "fresh"  # not beside a CIFAR-10
    root.mkdir(parents=True)
    if fault == "no folder":
        with pytest.raises(UserError, match="no such folder"):
            load("cifar10", root / "nowhere")
        return
    with pytest.raises(UserError) as error:
        load("cifar10", root)
    for part in (CIFAR10.filename, CIFAR10.tgz_md5, str(root)):
        assert part in str(error.value)
    assert list(root.iterdir()) == []  # no partial archive


@pytest.mark.skipif("DATA_DIR" not in os.environ, reason="DATA_DIR names no folder with CIFAR-10")
def test_real_cifar10():
    root = Path(os.environ["DATA_DIR"])
    if not cifar10.cifar10_on_disk(root):
        pytest.skip(f"{root} holds no CIFAR-10")
    loaded = load("cifar10", root, train_size=None, test_size=None)
    assert [len(split.images) for split in loaded[2:]] == [45_000, 5_000, 10_000]
