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

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
SIZE, BATCH, SEED = 40, 4, 5
#: what the stream holds: the sample at each place of the first epoch
ORDER = list(islice(TrainingSampler(SIZE, BATCH, SEED), SIZE))


class Images(ImageFolder):
    """A folder of images of which some lie on a file system that is gone: reading one waits for ever."""

    gone = frozenset()

    def __getitem__(self, index):
        if index in self.gone:
            open(self.source(index), "rb").close()  # a pipe that nobody writes to
        return super().__getitem__(index)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Forty JPEG files, each of its own grey."""
    monkeypatch.setattr(samples, "PAUSE", 0.0)
    for number in range(SIZE):
        Image.new("RGB", (16, 16), (number * 6,) * 3).save(tmp_path / f"{number:02d}.jpg", quality=95)
    return Images(str(tmp_path), labelled=False)


def number_and_draw(image, target):
    """Which image it is, by its grey, and what a transform draws."""
    return round(np.asarray(image).mean() / 6), random.random()


def loader_of(dataset, workers=0, **options):
    return build_train_loader(dataset, BATCH, number_and_draw, num_workers=workers, seed=SEED, **options)


def numbers(loader, count):
    return [number for batch, _ in islice(loader, count) for number in batch.tolist()]


def remove(images, number):
    os.remove(images.source(number))


def hang(images, number):
    remove(images, number)
    os.mkfifo(images.source(number))
    images.gone = images.gone | {number}


def truncate(images, number):
    os.truncate(images.source(number), 300)


@pytest.mark.parametrize("spoil", [remove, truncate])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_goes_bad_under_way_is_replaced_and_all_others_stay(images, workers, spoil):
    bad = [ORDER[32], ORDER[39]]  # later than what two workers read ahead
    assert numbers(loader_of(images), 10) == ORDER
    stream = iter(loader_of(images, workers, on_bad="skip"))
    found = numbers(stream, 1)
    for number in bad:
        spoil(images, number)
    found += numbers(stream, 9)
    assert [place for place in range(SIZE) if found[place] != ORDER[place]] == [32, 39]
    assert not set(bad) & set(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_skips_to_the_same_samples_and_draws_the_same_for_them(images, workers):
    for number in range(0, SIZE, 3):
        remove(images, number)
    whole = torch.stack([torch.stack(batch) for batch in islice(loader_of(images, on_bad="skip"), 25)])
    rest = islice(loader_of(images, workers, on_bad="skip", start_step=11), 14)
    assert torch.equal(torch.stack([torch.stack(batch) for batch in rest]), whole[11:])
    stand_ins = whole[:, 0].flatten()[[place for place in range(SIZE) if ORDER[place] % 3 == 0]]
    assert len(stand_ins.unique()) > 5  # not one and the same for all
    other = build_train_loader(images, BATCH, number_and_draw, seed=SEED + 1, on_bad="skip")
    assert numbers(other, 25) != whole[:, 0].flatten().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_named_once_however_often_it_is_drawn_and_whichever_worker_draws_it(images, workers, caplog):
    bad = [ORDER[1], ORDER[6]]
    for number in bad:
        remove(images, number)
    loader = loader_of(images, workers)
    with caplog.at_level(logging.WARNING):
        numbers(loader, 60)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"Image {images.source(number)} does not exist. Other samples take its place ({count} bad so far)."
        for count, number in enumerate(bad, start=1)
    ]
    assert list(loader.bad) == [images.source(number) for number in bad]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_which_bad_files_are_known_after_a_batch_does_not_depend_on_the_workers(images, workers):
    for number in range(0, SIZE, 3):
        remove(images, number)
    loader, counts = loader_of(images, workers), []
    for _ in islice(loader, 6):
        counts.append(len(loader.bad))
    alone = loader_of(images)
    assert counts == [len(alone.bad) for _ in islice(alone, 6)]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1]


def test_a_read_that_fails_for_a_moment_only_is_done_again(images, monkeypatch, caplog):
    away = images.source(ORDER[2])
    os.rename(away, away + ".away")
    monkeypatch.setattr(samples, "PAUSE", 0.25)
    pauses = []

    def come_back(seconds):
        pauses.append(seconds)
        os.rename(away + ".away", away)

    monkeypatch.setattr(samples.time, "sleep", come_back)
    assert numbers(loader_of(images, on_bad="skip"), 10) == ORDER
    assert pauses == [0.25] and not caplog.records


def test_a_bad_file_ends_the_run_where_it_is_not_to_be_skipped(images):
    remove(images, ORDER[2])
    with pytest.raises(DatasetError, match=rf"{images.source(ORDER[2])} does not exist\. Or set on_bad=skip"):
        numbers(loader_of(images, on_bad="error"), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_all_files_are_gone_the_run_ends(images, workers):
    for number in range(SIZE):
        remove(images, number)
    with pytest.raises(DatasetError, match=r"1,000 samples in a row cannot be used; the first of them: Image .*\.jpg"):
        numbers(loader_of(images, workers, on_bad="skip"), 1)


def test_what_is_no_fault_of_the_data_is_not_skipped(images):
    def broken(image, target):
        raise ValueError("of the transform")

    with pytest.raises(ValueError, match="of the transform"):
        next(iter(build_train_loader(images, BATCH, broken, on_bad="skip")))


def test_a_bad_file_ends_an_evaluation_unless_it_is_to_be_left_out(images):
    remove(images, 3)
    with pytest.raises(DatasetError, match=r"does not exist\. Or set on_bad=skip of this loader, to leave it out"):
        list(build_test_loader(images, BATCH, number_and_draw))
    with pytest.raises(ConfigError, match="on_bad is 'drop'; accepted are error and skip"):
        build_test_loader(images, BATCH, number_and_draw, on_bad="drop")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_leaves_out_what_it_may_and_all_of_a_batch_if_need_be(images, workers, caplog):
    bad = [3, 8, 9, 10, 11]
    for number in bad:
        remove(images, number)
    loader = build_test_loader(images, BATCH, number_and_draw, num_workers=workers, on_bad="skip")
    with caplog.at_level(logging.WARNING):
        batches = [batch.tolist() for batch, _ in loader]
    left = [[number for number in range(start, start + BATCH) if number not in bad] for start in range(0, SIZE, BATCH)]
    assert batches == [batch for batch in left if batch] and len(batches) == len(left) - 1
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"Image {images.source(3)} does not exist. It is left out (1 bad so far)." and len(said) == 5
    assert list(loader.bad) == [images.source(number) for number in bad]


def test_an_evaluation_reads_once_more_what_failed_for_a_moment(images, monkeypatch):
    away = images.source(7)
    os.rename(away, away + ".away")
    monkeypatch.setattr(samples.time, "sleep", lambda seconds: os.rename(away + ".away", away))
    loader = build_test_loader(images, BATCH, number_and_draw, on_bad="skip")
    assert [number for batch, _ in loader for number in batch.tolist()] == list(range(SIZE)) and not loader.bad


@pytest.fixture
def hanging(images):
    """Of the third batch, one file lies on a file system that is gone."""
    hang(images, ORDER[9])
    return images


def described(images, batch):
    samples = ", ".join(f"{number} ({images.source(number)})" for number in ORDER[BATCH * batch :][:BATCH])
    return f"they were to deliver batch {batch}, which has 4 samples: {samples}."


@pytest.mark.parametrize("pin_memory", [False, pytest.param(True, marks=GPU)])
def test_a_read_that_hangs_ends_with_the_names_of_the_samples(hanging, pin_memory):
    loader = loader_of(hanging, 2, on_bad="error", timeout=2, pin_memory=pin_memory)
    stream = iter(loader)
    assert numbers(stream, 2) == ORDER[:8]
    with pytest.raises(DatasetError) as caught:
        next(stream)
    assert "gave no batch within timeout=2 seconds" in str(caught.value)
    assert described(hanging, 2) in str(caught.value)
    assert not any(worker.is_alive() for worker in loader._iterator._workers)  # else this process would not end


def test_so_does_an_evaluation(images):
    hang(images, 6)
    loader = build_test_loader(images, BATCH, number_and_draw, num_workers=1, timeout=1)
    stream = iter(loader)
    next(stream)
    with pytest.raises(DatasetError, match=r"batch 1, which has 4 samples: 4 \(.*04.jpg\), 5 .*, 6 .*, 7 .*07.jpg\)"):
        next(stream)
    with pytest.raises(ConfigError, match="timeout=1 needs num_workers of 1 or more"):
        build_test_loader(images, BATCH, number_and_draw, timeout=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_hangs_is_given_up_twice_and_another_sample_takes_its_place(images, workers, caplog):
    hang(images, ORDER[9])
    remove(images, ORDER[14])
    found = numbers(loader_of(images, workers, on_bad="skip", timeout=0.4), 10)
    assert [place for place in range(SIZE) if found[place] != ORDER[place]] == [9, 14]
    whole = loader_of(images, on_bad="skip", timeout=0.4)
    told, number = [record.getMessage() for record in caplog.records], ORDER[9]
    assert any(
        f"Sample {number} ({images.source(number)}) was not read within timeout=0.4 seconds" in one for one in told
    )
    assert numbers(whole, 10) == found


def test_what_is_drawn_is_the_same_with_and_without_a_timeout(images):
    with_one, without = (islice(loader_of(images, on_bad="skip", timeout=t), 5) for t in (30, 0))
    assert all(
        torch.equal(a, b) for one, other in zip(with_one, without, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_an_error_of_the_reader_is_that_of_the_sample(images):
    def broken(self, index):
        raise ValueError("of the reader")

    type(images).__getitem__, kept = broken, type(images).__getitem__
    try:
        with pytest.raises(ValueError, match="of the reader"):
            next(iter(loader_of(images, on_bad="skip", timeout=5)))
    finally:
        type(images).__getitem__ = kept


def test_reading_that_only_takes_its_time_is_left_alone(images):
    assert numbers(loader_of(images, 2, timeout=60), 10) == ORDER


def test_of_many_samples_the_first_are_named(images):
    hang(images, ORDER[0])
    loader = build_train_loader(images, 12, number_and_draw, num_workers=1, seed=SEED, on_bad="error", timeout=1)
    with pytest.raises(DatasetError, match=rf"batch 0, which has 12 samples: {ORDER[0]} .*\.jpg\) and 7 more\."):
        next(iter(loader))


def test_stopping_at_once_does_not_wait_for_a_read_that_hangs(hanging):
    def stop(number, frame):
        raise KeyboardInterrupt

    loader = loader_of(hanging, 2)
    stream = iter(loader)
    numbers(stream, 2)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not any(worker.is_alive() for worker in loader._iterator._workers)


@pytest.mark.parametrize(("killed", "batch"), [(0, 2), (1, 3)])
def test_a_worker_that_is_killed_is_told_of_with_its_batch(hanging, killed, batch):
    loader = loader_of(hanging, 2)
    stream = iter(loader)
    numbers(stream, 2)
    pid = loader._iterator._workers[killed].pid
    timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(DatasetError) as caught:
        next(stream)  # waits for the batch that hangs
    timer.join()
    assert f"A loader's worker was lost: DataLoader worker (pid {pid}) is killed by signal: Killed. It was to" in str(
        caught.value
    )
    assert described(hanging, batch).removeprefix("they were ") in str(caught.value)
    assert str(caught.value).endswith(
        "take fewer workers (num_workers), or give the job more memory, and go on with --resume."
    )


def test_of_a_stream_the_batch_alone_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(samples.DrawnStream, "__iter__", lambda stream: iter([time.sleep(60)]))
    dataset = SimpleNamespace(stream=lambda *arguments: None)
    loader = loader_of(dataset, 1, start_step=7, timeout=1)
    with pytest.raises(DatasetError, match="to deliver batch 7 of a stream, whose samples have no numbers"):
        next(iter(loader))


def test_a_worker_that_dies_while_the_run_computes_is_told_of_as_well(images):
    loader = loader_of(images, 2)
    stream = iter(loader)
    numbers(stream, 1)
    os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        for _ in range(1000):
            time.sleep(0.01)
    assert "is killed by signal: Killed. Killed is most often" in str(lost_worker(caught.value))


def test_a_process_ends_with_workers_that_hang_in_a_read(images, process):
    soon = next(number for number in ORDER[8:20] if 8 <= number < 20)  # read ahead in both orders
    hang(images, soon)
    program = f"""
from bissl_zoo.data import ImageFolder
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
class Images(ImageFolder):
    def __getitem__(self, index):
        if index == {soon}:
            open({images.source(soon)!r}, "rb").close()
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
            running.kill()  # where it does not end
    assert (running.returncode, out) == (3, "[[16, 16, 16, 16], [16, 16, 16, 16]]\n"), err


def test_other_errors_are_no_lost_workers(images):
    def broken(image, target):
        raise RuntimeError("of the transform")

    with pytest.raises(RuntimeError, match="of the transform") as caught:
        next(iter(build_train_loader(images, BATCH, broken, num_workers=1)))
    assert lost_worker(caught.value) is None
    assert lost_worker(ValueError("DataLoader worker (pid 1) is killed by signal: Killed.")) is None


def test_values_that_nothing_stands_for_are_refused(images):
    with pytest.raises(ConfigError, match="on_bad is 'skipp'; accepted are error and skip. Did you mean 'skip'?"):
        loader_of(images, on_bad="skipp")
    for timeout in (-1, "long", True, float("inf"), None):
        with pytest.raises(ConfigError, match=rf"timeout is {timeout!r}; it must be a number of seconds"):
            loader_of(images, 2, timeout=timeout)
    with pytest.raises(ConfigError, match="timeout=2.5 needs num_workers of 1 or more: without workers the run itself"):
        loader_of(images, on_bad="error", timeout=2.5)
    with pytest.raises(
        ConfigError, match=r"has its own\. Set it there, as in dataloader\.pretext\.dataset\.on_bad=error"
    ):
        loader_of(SimpleNamespace(stream=None), on_bad="error")


def test_a_check_refuses_what_it_does_not_know(tiny, train_net):
    for role in ("train", "test"):
        said = train_net("--dry-run", *tiny(), f"+dataloader.{role}.on_bad=drop").message()
        assert "on_bad is 'drop'; accepted are error and skip." in said
