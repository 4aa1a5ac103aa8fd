import base64
import threading
import time

import pytest
import requests
import torch
import uvicorn

from cmtool.page.desk import Desk
from cmtool.page.server import build, listening
from tests.cli.conftest import cmtool  # noqa: F401


@pytest.fixture(scope="session")
def desk():
    """A desk with the bundled one-step model of digits, which has ten classes."""
    from cmtool.models import load_model

    return Desk(load_model("digits-cd"), "digits-cd")


@pytest.fixture
def digit(desk):
    """The bytes of a held-out digit's pixels, row by row."""
    return base64.b64decode(desk.example(3)["pixels"])


class Site:
    """A server of a desk, and a client of it."""

    def __init__(self, desk, key=""):
        self.listener = listening("127.0.0.1", 0)
        self.host = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.app = build(desk, None if key else {self.host}, key)
        config = uvicorn.Config(self.app, log_level="critical", lifespan="off", ws="none")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.client = requests.Session()
        self.client.headers["X-Tab"] = "test"

    def __enter__(self):
        self.thread.start()
        end = time.monotonic() + 20
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()

    def get(self, path, **options):
        return self.client.get(f"http://{self.host}/{path}", timeout=60, **options)

    def post(self, path, json=None, **options):
        return self.client.post(f"http://{self.host}/{path}", json=json, timeout=60, **options)


@pytest.fixture
def page(desk):
    with Site(desk) as site:
        yield site


def text(content):
    """Bytes, or a tensor's, as JSON carries them."""
    if isinstance(content, torch.Tensor):
        content = content.to(torch.uint8).numpy().tobytes()
    return base64.b64encode(content).decode()
