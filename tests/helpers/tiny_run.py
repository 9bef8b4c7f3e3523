"""A whole training program in one file, made of the real parts, for tests that kill, stop and resume it."""

import argparse
import copy
import hashlib
import os
import random
import time

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from irpe_train import distributed
from irpe_train.arguments import add_runtime_arguments
from irpe_train.checkpoint import load_matching
from irpe_train.launch import launch
from irpe_train.loader import EvalLoader, TrainLoader
from irpe_train.logger import logger
from irpe_train.metrics import MetricLogger
from irpe_train.precision import Precision
from irpe_train.preemption import STOP
from irpe_train.run import open_run
from irpe_train.run_folder import Checkpoints
from irpe_train.seeding import seed_everything
from irpe_train.state import TrainState

KEYS = ("model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args")


class Points(Dataset):
    """Two noisy classes; the noise comes from all three generators, as augmentation does."""

    def __init__(self, count: int, train: bool, unreadable: tuple[int, ...] = ()):
        self.count, self.train, self.unreadable = count, train, unreadable
        self.samples = [(f"images/{i:03d}.png", i % 2) for i in range(count)]

    def name(self, index):
        return self.samples[index][0]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise OSError("image file is truncated")
        generator = torch.Generator().manual_seed(index)
        point = torch.randn(8, generator=generator) + (index % 2)
        if self.train:
            point = point + 0.1 * (torch.rand(8) + random.random() + float(np.random.rand()))
        return point, index % 2


class Average:
    """A moving average with timm's interface."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            mine.lerp_(theirs, 0.1)


def get_parser():
    parser = argparse.ArgumentParser("tiny_run")
    parser.add_argument("--epochs", default=3, type=int)
    parser.add_argument("--lr", default=0.05, type=float)
    parser.add_argument("--batch-size", default=4, type=int)
    parser.add_argument("--images", default=48, type=int)
    parser.add_argument("--test-images", default=13, type=int)
    parser.add_argument("--clip-grad", default=1.0, type=float)
    parser.add_argument("--unreadable", default=[], nargs="*", type=int)
    parser.add_argument("--unreadable-test", default=[], nargs="*", type=int)
    parser.add_argument("--nan-at", default=None, nargs=3, type=int, metavar=("RANK", "EPOCH", "STEP"))
    parser.add_argument("--die-at", default=None, nargs=3, type=int, metavar=("RANK", "EPOCH", "STEP"))
    parser.add_argument("--term-at", default=None, nargs=3, type=int, metavar=("RANK", "EPOCH", "STEP"))
    parser.add_argument("--step-time", default=0.0, type=float)
    add_runtime_arguments(parser, seed=0, num_workers=0, amp="none")
    return parser


def train_one_epoch(model, steps, state, precision, device, args):
    model.train()
    meters = state.meters
    for points, labels in steps.log_every(5):
        points, labels = points.to(device), labels.to(device)
        here = [distributed.rank(), state.epoch, state.step]
        time.sleep(args.step_time)
        if args.die_at == here:
            os._exit(9)
        if args.term_at == here:
            os.kill(os.getpid(), 15)
        with precision.autocast():
            loss = torch.nn.functional.cross_entropy(model(points), labels)
        if args.nan_at == here:
            loss = loss * float("nan")
        steps.watch(loss, lr=state.optimizer.param_groups[0]["lr"])
        precision.backward(loss / steps.group_size)
        steps.confirm()
        if steps.group_ends:
            precision.update(state.optimizer, model.parameters(), clip=args.clip_grad)
            state.ema.update(model)
        meters.update(loss=loss.detach(), lr=state.optimizer.param_groups[0]["lr"])
    return meters.averages()


@torch.no_grad()
def evaluate(model, loader, device):
    model.eval()
    meters = MetricLogger()
    for points, labels in meters.log_every(loader, header="Test:"):
        scores = model(points.to(device))
        right = (scores.argmax(1) == labels.to(device)).float().mean() * 100
        meters.update(acc1=right, n=len(points))
    return meters.averages()


@STOP.noting()
def main(args):
    device = distributed.start(device=args.device, dist_url=args.dist_url, timeout=args.dist_timeout)
    seed_everything(args.seed + distributed.rank(), deterministic=args.deterministic)
    checkpoints = Checkpoints(args.output_dir, KEYS)
    checkpoint = checkpoints.open(args.resume, evaluate=args.eval)

    train_set = Points(args.images, train=True, unreadable=tuple(args.unreadable))
    test_set = Points(args.test_images, train=False, unreadable=tuple(args.unreadable_test))
    sampler = DistributedSampler(train_set, distributed.world_size(), distributed.rank(), seed=args.seed)
    loader = TrainLoader(train_set, sampler, batch_size=args.batch_size, seed=args.seed, num_workers=args.num_workers)
    eval_loader = EvalLoader(test_set, batch_size=5, num_workers=args.num_workers)

    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    model.to(device)
    wrapped = distributed.wrap(model, device, compile=args.compile, deterministic=args.deterministic)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    precision = Precision(args.amp, device)

    state = TrainState(
        model,
        optimizer,
        scheduler,
        ema=Average(model),
        scaler=precision.scaler,
        flags=args,
        extra={"names": ["even", "odd"]},
    )
    state.epoch = args.start_epoch

    if args.eval:
        load_matching(model, checkpoint.weights(), source=checkpoint.source)
        print(evaluate(model, eval_loader, device))
        return

    where = dict(checkpoints=checkpoints, checkpoint=checkpoint, data_flags=())
    run = open_run(args, get_parser(), state, loader, **where, rows={}, stats={})
    while state.epoch < args.epochs:
        if state.train_stats is None:
            stats = train_one_epoch(wrapped, run.steps, state, precision, device, args)
            scheduler.step()
            run.steps.finish_training(stats)
        test_stats = evaluate(model, eval_loader, device)
        run.finish_epoch(test_stats, figure=test_stats["acc1"])
    run.close()
    digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.state_dict().values())).hexdigest()
    logger.info(f"done {digest[:16]} best {state.best:.2f}")


if __name__ == "__main__":
    launch(main, get_parser())
