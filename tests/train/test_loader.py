"""Loaders: the same samples from any step on and with any workers, each image evaluated once, unreadable ones named."""

import multiprocessing
import random
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler

from irpe_train import loader as loader_module
from irpe_train.errors import BadData
from irpe_train.loader import EvalLoader, TrainLoader, fitting_batch, try_all
from irpe_train.seeding import mix, sample_randomness, seed_everything, seed_step


class Draws:
    """(index, a number of each generator); some images are unreadable."""

    def __init__(self, count, unreadable=(), error=None):
        self.samples = [(f"a/{i}.png", 0) for i in range(count)]
        self.unreadable = unreadable
        self.error = error or OSError("image file is truncated (3 bytes not processed)")

    def name(self, index):
        return self.samples[index][0]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if index in self.unreadable:
            raise self.error
        return index, random.random(), np.random.rand(), torch.rand(()).item()


def draws(count=20, workers=0, **options):
    data = Draws(count, **options)
    return TrainLoader(data, RandomSampler(data), batch_size=3, seed=7, num_workers=workers)


def batches(loader, epoch, start=0):
    return [[column.tolist() for column in batch] for batch in loader.batches(epoch, start)]


def test_any_start_and_any_workers_give_the_same_batches():
    whole = batches(draws(), 4)
    assert len(whole) == 6 and len({index for batch in whole for index in batch[0]}) == 18
    random.random(), torch.rand(5)  # the state of the process does not matter
    workers = draws(workers=2)
    assert batches(workers, 4) == whole
    assert batches(workers, 4, start=2) == whole[2:]
    assert batches(draws(), 4, start=5) == whole[5:]
    assert batches(draws(), 4, start=6) == []
    order = [[batch[0] for batch in batches(draws(), epoch)] for epoch in (4, 5)]
    assert order[0] != order[1]  # the images come in another order too, not only the noise


@pytest.mark.parametrize("differs", ["epoch", "position", "seed"])
def test_noise_depends_on_each_of_seed_epoch_and_position(differs):
    def noise(seed, epoch, start):
        loader = TrainLoader(Draws(6), [3] * 6, batch_size=1, seed=seed)
        return batches(loader, epoch, start)[0][1:]

    assert noise(7, 4, 2) == noise(7, 4, 2)
    assert noise(7, 4, 2) != {"epoch": noise(7, 5, 2), "position": noise(7, 4, 3), "seed": noise(8, 4, 2)}[differs]


def test_loading_leaves_the_generators_of_the_process_alone():
    seed_step(0, rank=0, step=0)
    expected = random.random(), np.random.rand(), torch.rand(())
    seed_step(0, rank=0, step=0)
    next(draws().batches(0))
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_the_seed_of_a_run_is_that_of_every_generator(monkeypatch):
    def drawn(seed):
        seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    one, other = drawn(-1), drawn(2)
    assert drawn(-1) == one and not set(one) & set(other)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


def test_seeds_differ_between_neighbours_and_kinds():
    seeds = {mix("step", seed, rank, step) for seed in range(5) for rank in range(5) for step in range(5)}
    assert len(seeds) == 125 and mix("sample", 0, 0, 0) not in seeds and mix(1, 23) != mix(12, 3)
    with sample_randomness(1, 2):
        first = random.random(), np.random.rand(), torch.rand(()).item()
    assert len({round(value, 6) for value in first}) == 3


def test_every_position_has_its_own_randomness_even_for_one_image():
    """Repeated augmentation asks for one image several times in an epoch."""
    data = Draws(1)
    loader = TrainLoader(data, [0, 0, 0, 0], batch_size=4, seed=0)
    ((_, a, b, c),) = batches(loader, 0)
    assert len(set(a)) == len(set(b)) == len(set(c)) == 4


def test_a_smaller_last_batch_is_left_out():
    data = Draws(20)
    loader = TrainLoader(data, SequentialSampler(data), batch_size=3, seed=0)
    assert len(loader) == len(batches(loader, 0)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_image_is_replaced_counted_and_named(workers, capsys):
    from irpe_train.logger import set_up_logging

    set_up_logging(0)
    data = Draws(12, unreadable=(5, 6))
    loader = TrainLoader(data, SequentialSampler(data), batch_size=4, seed=0, num_workers=workers)
    assert [batch[0] for batch in batches(loader, 0)] == [[0, 1, 2, 3], [4, 7, 7, 7], [8, 9, 10, 11]]
    assert set(loader.bad) == {"a/5.png", "a/6.png"}
    printed = capsys.readouterr().out
    assert printed.count("a/5.png") == 1
    assert "unreadable training image, replaced by its neighbour: a/5.png (OSError: image file is truncated" in printed
    assert loader.samples(1) == ["a/4.png", "a/5.png", "a/6.png", "a/7.png"]
    batches(loader, 1, start=2)
    assert loader.bad == {}  # of the epoch that is read


def test_an_image_that_comes_again_is_named_once(capsys):
    from irpe_train.logger import set_up_logging

    set_up_logging(0)
    batches(TrainLoader(Draws(6, unreadable=(5,)), [5, 5, 5], batch_size=1, seed=0), 0)
    assert capsys.readouterr().out.count("a/5.png") == 1


class Orphaned(Draws):
    """Each image is made while a thread of multiprocessing finds the main process gone."""

    def __getitem__(self, index):
        sys.excepthook(ConnectionResetError, ConnectionResetError("by peer"), None)
        return super().__getitem__(index)


def test_a_worker_prints_no_traceback_if_the_main_process_is_gone(capfd):
    data = Orphaned(6)
    loader = TrainLoader(data, RandomSampler(data), batch_size=3, seed=7, num_workers=1)
    assert len(batches(loader, 0)) == 2 and capfd.readouterr().err == ""


def test_an_error_without_words_is_reported_too():
    loader = TrainLoader(Draws(4, unreadable=(1,), error=OSError()), [0, 1], batch_size=2, seed=0)
    batches(loader, 0)
    assert loader.bad == {"a/1.png": "OSError: no details"}


def test_a_sampler_for_several_processes_is_told_the_epoch():
    data = Draws(12)
    loader = TrainLoader(data, DistributedSampler(data, 1, 0), batch_size=12, seed=0)
    first, second = (batches(loader, epoch)[0][0] for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)


def test_many_unreadable_training_images_in_a_row_stop(capsys):
    data = Draws(40, unreadable=range(40))
    with pytest.raises(BadData, match=r"16 training images in a row are unreadable, the last: a/\d+.png \(OSError"):
        batches(TrainLoader(data, SequentialSampler(data), batch_size=1, seed=0), 0)


def test_a_mistake_in_the_data_set_is_not_an_unreadable_image():
    data = Draws(4, unreadable=(1,), error=TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        batches(TrainLoader(data, SequentialSampler(data), batch_size=1, seed=0), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_an_unreadable_image_and_stops(workers):
    loader = EvalLoader(Draws(5, unreadable=(3,)), batch_size=2, num_workers=workers)
    with pytest.raises(
        BadData,
        match=r"^evaluation cannot read a/3.png \(OSError: image file is truncated .*none is "
        "skipped",
    ):
        list(loader)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 13, 14])
def test_ranks_share_a_set_without_repeating(monkeypatch, world_size, count):
    monkeypatch.setattr(loader_module, "world_size", lambda: world_size)
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(loader_module, "rank", lambda rank=rank: rank)
        loader = EvalLoader(Draws(count), batch_size=2)
        of_rank = [batch[0].tolist() for batch in loader]
        assert of_rank == loader.batches and len(loader) == len(of_rank)
        seen += of_rank
        assert len(EvalLoader(Draws(count), batch_size=2, shard=False)) == -(-count // 2)
    assert sorted(seen) == [[i, i + 1][: count - i] for i in range(0, count, 2)]  # the batches of one process


def test_ranks_train_on_different_noise(monkeypatch):
    noise = []
    monkeypatch.setattr(loader_module, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(loader_module, "rank", lambda rank=rank: rank)
        data = Draws(4)
        noise.append(batches(TrainLoader(data, SequentialSampler(data), batch_size=4, seed=0), 0)[0][1])
    assert not set(noise[0]) & set(noise[1])


def test_sizes_that_cannot_work_are_refused():
    data = Draws(2)
    with pytest.raises(ValueError, match="2 training samples per process and epoch do not fill a batch of 3"):
        TrainLoader(data, SequentialSampler(data), batch_size=3, seed=0)


@pytest.mark.parametrize(
    ("wanted", "samples", "multiple", "size", "told"),
    [
        (4, 5, 2, 4, ""),
        (8, 5, 2, 4, "5 training samples per process: the batch is 4, not 8"),
        (8, 5, 1, 5, "5 training samples per process: the batch is 5, not 8"),
        (8, 1, 2, 0, ""),
    ],
)
def test_a_batch_is_no_larger_than_the_samples(wanted, samples, multiple, size, told, monkeypatch):
    said = []
    monkeypatch.setattr(loader_module.logger, "warning", said.append)
    assert fitting_batch(wanted, samples, multiple) == size and said == [told] * bool(told)


def test_a_worker_that_cannot_hand_over_its_batch_ends_instead_of_being_waited_for(tmp_path, monkeypatch, capfd):
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))  # too long for the name of a socket
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    with pytest.raises(RuntimeError, match=r"DataLoader worker .*exited"):
        next(iter(EvalLoader(Draws(4), batch_size=2, num_workers=1)))
    told = "a data loading worker cannot hand over a batch (AF_UNIX path too long). It needs a TMPDIR that is writable"
    assert capfd.readouterr().err.startswith(told)


def test_no_more_workers_are_started_than_there_are_batches(monkeypatch):
    """Otherwise ``--num_workers 1000`` forks a thousand processes for a handful of images."""
    started, make = [], loader_module.DataLoader

    def counted(*args, num_workers, **how):
        started.append(num_workers)
        return make(*args, **how | {"persistent_workers": False, "multiprocessing_context": None})

    monkeypatch.setattr(loader_module, "DataLoader", counted)
    TrainLoader(Draws(7), SequentialSampler(Draws(7)), batch_size=2, seed=0, num_workers=1000)
    EvalLoader(Draws(7), batch_size=2, num_workers=1000)
    assert [index for index, _ in try_all(lambda index: index, range(65), 1000)] == list(range(65))
    assert started == [3, 4, 2]
