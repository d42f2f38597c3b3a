"""CIFAR: torchvision's downloader against a local server with a small archive."""

import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision

from cifar_dist.config import DataConfig, UsageError
from cifar_dist.data import load_dataset


def archive() -> tuple[bytes, dict[str, str]]:
    """Build a CIFAR-10 archive of 3 images a file; returns it and each file's MD5."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {
        name: pickle.dumps(
            {
                "data": random.integers(0, 256, (3, 3072)).astype(np.uint8),
                "labels": [number % 10, 1, 2],
            }
        )
        for number, name in enumerate(names)
    }
    classes = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    files["batches.meta"] = pickle.dumps({"label_names": classes})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    return buffer.getvalue(), md5


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the archive to torchvision; the list holds the requests made."""
    content, md5 = archive()
    requests: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    cifar10 = torchvision.datasets.CIFAR10
    url = f"http://127.0.0.1:{http_server.server_port}/cifar-10-python.tar.gz"
    monkeypatch.setattr(cifar10, "url", url)
    monkeypatch.setattr(cifar10, "tgz_md5", hashlib.md5(content).hexdigest())
    names = [f"data_batch_{number}" for number in range(1, 6)]
    monkeypatch.setattr(cifar10, "train_list", [[name, md5[name]] for name in names])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", md5["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5["batches.meta"]}
    monkeypatch.setattr(cifar10, "meta", meta)
    yield requests
    http_server.shutdown()
    http_server.server_close()


def test_it_is_downloaded_once_and_cached(server: list[str], tmp_path: Path) -> None:
    root = tmp_path / "data"
    dataset = load_dataset(DataConfig(name="cifar10", root=str(root)))
    assert len(dataset.train) == 15
    assert len(dataset.evaluation["test"]) == 3
    assert dataset.classes[0] == "airplane"
    reference = torchvision.datasets.CIFAR10(root, train=True)
    assert np.array_equal(dataset.train.images, reference.data)
    assert dataset.train.labels.tolist() == reference.targets
    requests = len(server)
    again = load_dataset(DataConfig(name="cifar10", root=str(tmp_path / "elsewhere")))
    assert again.digest == dataset.digest
    assert len(server) == requests
    large = load_dataset(DataConfig(name="cifar10", root=str(root), image_size=48))
    assert large.train.images.shape == (15, 48, 48, 3)


def test_offline_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(UsageError) as refused:
        load_dataset(DataConfig(name="cifar10", root=str(tmp_path / "data")))
    message = str(refused.value)
    assert "put cifar-10-python.tar.gz there" in message
    assert "--data.name synthetic" in message
    assert "\n" not in message


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        load_dataset(DataConfig(name="cifar10", root=str(tmp_path / "data")))
