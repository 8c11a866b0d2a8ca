import logging
import os
import random
import signal
import threading
import time
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_zoo.data import ImageFolder, samples
from bissl_zoo.data.loaders import TrainingSampler, build_test_loader, build_train_loader
from bissl_zoo.data.samples import lost_worker
from bissl_zoo.errors import ConfigError, DatasetError

SIZE, BATCH, SEED = 40, 4, 5
#: sample number at each place of the first epoch
ORDER = list(islice(TrainingSampler(SIZE, BATCH, SEED), SIZE))
WORKERS = [0, pytest.param(2, marks=pytest.mark.slow)]


class Images(ImageFolder):
    """A folder of images; reading one of `hanging` waits forever, as on a file system that is gone."""

    hanging = frozenset()

    def __getitem__(self, index):
        if index in self.hanging:
            open(self.source(index), "rb").close()  # a pipe without a writer
        return super().__getitem__(index)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Forty JPEG files, each of another gray."""
    monkeypatch.setattr(samples, "RETRY_PAUSE", 0.0)
    for number in range(SIZE):
        Image.new("RGB", (16, 16), (number * 6,) * 3).save(tmp_path / f"{number:02d}.jpg", quality=95)
    return Images(str(tmp_path), labelled=False)


def number_and_draw(image, target):
    """Return the number of the image, from its gray, and a random draw."""
    return round(np.asarray(image).mean() / 6), random.random()


def loader_of(dataset, workers=0, **options):
    return build_train_loader(dataset, BATCH, number_and_draw, num_workers=workers, seed=SEED, **options)


def numbers(loader, count=None):
    return [number for batch, _ in islice(loader, count) for number in batch.tolist()]


def remove(images, number):
    os.remove(images.source(number))


def hang(images, number):
    remove(images, number)
    os.mkfifo(images.source(number))
    images.hanging = images.hanging | {number}


def truncate(images, number):
    os.truncate(images.source(number), 300)


@pytest.mark.parametrize("damage", [remove, truncate])
@pytest.mark.parametrize("workers", WORKERS)
def test_a_file_that_is_damaged_during_the_run_is_replaced_and_all_others_stay(images, workers, damage):
    victims = [ORDER[32], ORDER[39]]  # later than what two workers read ahead
    stream = iter(loader_of(images, workers))
    result = numbers(stream, 1)
    for number in victims:
        damage(images, number)
    result += numbers(stream, 9)
    assert [place for place in range(SIZE) if result[place] != ORDER[place]] == [32, 39]
    assert not set(victims) & set(result)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_resumed_run_draws_the_same_replacements_and_the_same_randomness(images, workers):
    for number in range(0, SIZE, 3):
        remove(images, number)
    whole = torch.stack([torch.stack(batch) for batch in islice(loader_of(images), 25)])
    rest = islice(loader_of(images, workers, start_step=11), 14)
    assert torch.equal(torch.stack([torch.stack(batch) for batch in rest]), whole[11:])
    replacements = whole[:, 0].flatten()[[place for place in range(SIZE) if ORDER[place] % 3 == 0]]
    assert len(replacements.unique()) > 5
    other = build_train_loader(images, BATCH, number_and_draw, seed=SEED + 1)
    assert numbers(other, 25) != whole[:, 0].flatten().tolist()


@pytest.mark.parametrize("workers", WORKERS)
def test_a_skipped_file_is_logged_once_and_counted_over_all_workers(images, workers, caplog):
    victims = [ORDER[1], ORDER[6]]
    for number in victims:
        remove(images, number)
    loader = loader_of(images, workers)
    with caplog.at_level(logging.WARNING):
        numbers(loader, 60)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    for count, (number, message) in enumerate(zip(victims, messages, strict=True), start=1):
        assert images.source(number) in message and f"({count} skipped so far)" in message
    assert list(loader.skipped) == [images.source(number) for number in victims]


@pytest.mark.parametrize("build", [build_train_loader, build_test_loader])
def test_a_read_that_fails_once_is_tried_again_after_a_pause(images, monkeypatch, caplog, build):
    path = images.source(ORDER[2])
    os.rename(path, path + ".away")
    monkeypatch.setattr(samples, "RETRY_PAUSE", 0.25)
    pauses = []

    def come_back(seconds):
        pauses.append(seconds)
        os.rename(path + ".away", path)

    monkeypatch.setattr(samples.time, "sleep", come_back)
    options = {"seed": SEED} if build is build_train_loader else {}
    loader = build(images, BATCH, number_and_draw, on_bad="skip", **options)
    assert numbers(loader, 10) == (ORDER if options else list(range(SIZE)))
    assert pauses == [0.25] and not caplog.records and not loader.skipped


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_unreadable_file_raises_if_it_may_not_be_skipped(images, workers):
    remove(images, ORDER[2])
    with pytest.raises(DatasetError, match=rf"^Image {images.source(ORDER[2])} does not exist.*on_bad=skip"):
        numbers(loader_of(images, workers, on_bad="error"), 1)
    with pytest.raises(DatasetError, match=r"^Image .* does not exist.*on_bad=skip"):
        list(build_test_loader(images, BATCH, number_and_draw, num_workers=workers))


def test_a_run_whose_files_are_all_gone_ends(images):
    for number in range(SIZE):
        remove(images, number)
    with pytest.raises(DatasetError, match=r"1,000 samples in a row cannot be read; the first: Image .*\.jpg"):
        numbers(loader_of(images), 1)


@pytest.mark.parametrize("where", ["transform", "reader"])
def test_other_errors_are_not_skipped(images, monkeypatch, where):
    def fail(*arguments):
        raise ValueError("a bug")

    if where == "reader":
        monkeypatch.setattr(Images, "__getitem__", fail)
    transform = fail if where == "transform" else number_and_draw
    with pytest.raises(ValueError, match="a bug"):
        next(iter(build_train_loader(images, BATCH, transform)))


@pytest.mark.parametrize("workers", WORKERS)
def test_an_evaluation_leaves_out_unreadable_files_and_a_batch_without_any_other(images, workers, caplog):
    victims = [3, 8, 9, 10, 11]
    for number in victims:
        remove(images, number)
    loader = build_test_loader(images, BATCH, number_and_draw, num_workers=workers, on_bad="skip")
    batches = [batch.tolist() for batch, _ in loader]
    left = [[n for n in range(start, start + BATCH) if n not in victims] for start in range(0, SIZE, BATCH)]
    assert batches == [batch for batch in left if batch] and len(batches) == len(left) - 1
    assert len(caplog.records) == 5
    assert list(loader.skipped) == [images.source(number) for number in victims]


@pytest.mark.slow
def test_a_read_that_hangs_ends_the_run_if_a_timeout_is_set(images):
    hang(images, 6)
    with pytest.raises(DatasetError, match="No batch came within timeout=1 seconds"):
        list(build_test_loader(images, BATCH, number_and_draw, num_workers=1, timeout=1))


def test_on_bad_of_a_stream_is_set_at_its_data_set():
    with pytest.raises(ConfigError, match=r"dataloader\.pretext\.dataset\.on_bad=error"):
        loader_of(SimpleNamespace(stream=None), on_bad="error")


# workers


@pytest.mark.slow
def test_a_killed_worker_is_reported(images):
    hang(images, ORDER[9])
    stream = iter(loader := loader_of(images, 2))
    numbers(stream, 2)
    pid = loader._iterator._workers[0].pid
    timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(DatasetError, match=rf"\(pid {pid}\) was killed by SIGKILL.*--resume"):
        next(stream)  # waits for the batch that hangs
    timer.join()
    assert lost_worker(RuntimeError()) is None  # the next error is another one


@pytest.mark.slow
def test_a_worker_that_is_killed_while_the_main_process_computes_is_recognised(images):
    loader = loader_of(images, 2)
    stream = iter(loader)
    numbers(stream, 1)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        for _ in range(1000):
            time.sleep(0.01)
    assert "was killed by SIGKILL" in str(lost_worker(caught.value))
    assert lost_worker(ValueError()) is None
    samples.kill(loader._iterator._workers)


@pytest.mark.slow
def test_a_process_ends_although_its_workers_hang_in_a_read(images, process):
    victim = next(number for number in ORDER[8:20] if 8 <= number < 20)  # read ahead in both orders
    hang(images, victim)
    program = f"""
from bissl_zoo.data import ImageFolder
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
class Images(ImageFolder):
    def __getitem__(self, index):
        if index == {victim}:
            open({images.source(victim)!r}, "rb").close()
        return super().__getitem__(index)
def width(image, target):
    return image.size[0]
if __name__ == "__main__":
    images = Images({str(images.root)!r}, labelled=False)
    loaders = build_test_loader(images, 4, width, num_workers=2), build_train_loader(images, 4, width, None, 2, {SEED})
    streams = [iter(loader) for loader in loaders]
    print([next(stream).tolist() for stream in streams], flush=True)
    raise SystemExit(3)
"""
    (images.root / "program.py").write_text(program)
    with process(images.root / "program.py") as running:
        try:
            out, err = running.communicate(timeout=120)
        finally:
            running.kill()
    assert (running.returncode, out) == (3, "[[16, 16, 16, 16], [16, 16, 16, 16]]\n"), err
