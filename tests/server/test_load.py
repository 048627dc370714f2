"""Many clients at once: nobody gets another's mask, and load makes batches."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.launch import ServerProcess
from tests.conftest import Offline, Sample
from tests.server.test_segment import read_png

CLIENTS = 8


def batch_statistics(server: ServerProcess) -> tuple[float, float]:
    """Images and batches that ran so far."""
    text = httpx.get(f"{server.url}/metrics").text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return values["slsnet_batch_size_sum"], values["slsnet_batch_size_count"]


def test_200_photos_from_8_clients_equal_the_offline_prediction(
    server: ServerProcess, many_photos: list[Sample], offline: Offline
) -> None:
    images_before, batches_before = batch_statistics(server)

    def send(photos: list[Sample]) -> list[bytes]:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            return [
                client.post("/segment", files={"file": photo.data}).raise_for_status().content
                for photo in photos
            ]

    with ThreadPoolExecutor(CLIENTS) as clients:
        shares = [many_photos[start::CLIENTS] for start in range(CLIENTS)]
        answers = list(clients.map(send, shares))

    images, batches = batch_statistics(server)
    assert images - images_before == len(many_photos) == 200
    assert (images - images_before) / (batches - batches_before) > 2
    for photos, masks in zip(shares, answers, strict=True):
        for photo, mask in zip(photos, masks, strict=True):
            np.testing.assert_array_equal(read_png(mask), offline.mask(photo.data), photo.name)
