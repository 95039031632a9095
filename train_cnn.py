"""Train the report's second model, four 4x4 convolutions, to imitate the chain
Resize(28) -> Grayscale -> horizontal flip -> vertical flip on CIFAR-10, with MSE or with MSE plus
a VGG16 perceptual loss.

    python train_cnn.py                        the report's net: it cannot learn the flips
    python train_cnn.py --flip fixed           behind a fixed flip of its input it learns the rest
    python train_cnn.py --perceptual           the perceptual loss at 224 px, meant for a GPU
    python train_cnn.py --perceptual --vgg-size 32 --train-size 5000       on a CPU
    python train_cnn.py --perceptual --compare runs/cnn/best.pt            another CNN beside it
    python train_cnn.py --plain                without fast_cpu.py's fast path, or torch.compile
    python train_cnn.py --resume               continue after Ctrl-C or a crash

Expected on CIFAR-10: behind the fixed flip 99.9 % of the test images at a cosine similarity of
0.95; with learned flips about 30 %, where a constant gray image has 33 % (results/README.md). An
epoch of 45,000 images takes seven minutes on two CPU cores with AVX2 alone, two seconds on an H200.
With the perceptual loss at 224 px in bfloat16 it takes 12 seconds there; the first one, which
compiles, takes half a minute.
"""

if __name__ == "__main__":  # Ctrl-C during the imports ends the script without a traceback
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
from pathlib import Path

import torch
from torch import nn

from common import cli, distributed, fast_cpu
from common.checkpoints import claim, load_checkpoint
from common.data import load_data
from common.early_stopping import EarlyStopping
from common.evaluate import evaluate
from common.models import ConvNet
from common.perceptual import PerceptualLoss, compiled
from common.report import write_report
from common.run import Run


def main() -> None:
    # --- flags, device, data ---------------------------------------------------------------------
    parser = cli.parser(__doc__, epochs=5, batch_size=64, lr=1e-3)
    parser.add_argument("--perceptual", action="store_true", help="add the VGG16 loss to the MSE")
    parser.add_argument(
        "--vgg-weights",
        type=cli.path,
        default=os.environ.get("VGG16_WEIGHTS") or "imagenet",
        metavar="{imagenet,random,PATH}",
        help="default: $VGG16_WEIGHTS, else imagenet",
    )
    parser.add_argument(
        "--vgg-size", type=cli.number(int, 32), default=224, help="at least 32 (default: 224)"
    )
    cli.choice(parser, "--flip", "learned", "fixed")
    parser.add_argument(
        "--plain", action="store_true", help="no fast path, as with FAST_CPU=0; no compilation"
    )
    parser.add_argument(
        "--compare", type=cli.path, metavar="PATH", help="best.pt of another CNN, shown beside it"
    )
    args = cli.parse(parser, "cnn")  # the default of --out: runs/cnn, runs/cnn-fixed, ...
    if args.dry_run:
        args.vgg_size = 32
    if args.plain:
        fast_cpu.enable(False)
    torch.manual_seed(args.seed)
    device = distributed.init(args)
    fixed = {"epochs"}  # may not change under --resume, as the learning rate depends on it
    claim(args, fixed)  # --out: one run at a time
    data = load_data(args, device)  # .train, .val, .test: uint8 images and their targets

    # --- model, loss, optimizer, early stopping --------------------------------------------------
    model = ConvNet(args.flip).to(device)
    models = {"CNN, perceptual loss" if args.perceptual else "CNN, MSE": model}
    if args.compare:
        other = ConvNet()
        flags = load_checkpoint(Path(args.compare), other).get("args") or {}
        other.flip = flags.get("flip", "learned")
        models[Path(args.compare).absolute().parent.name] = other.to(device)
    with distributed.first_rank_first():  # one rank downloads the VGG16
        loss_fn = (
            PerceptualLoss(args.vgg_weights, args.vgg_size) if args.perceptual else nn.MSELoss()
        )
    loss_fn.to(device)
    if args.perceptual and device.type == "cuda" and not args.plain:
        loss_fn.distances = compiled(loss_fn.distances)  # 16 ms a step instead of 40: H200, bf16

    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, betas=(0.9, 0.95), fused=True)
    stopping = EarlyStopping(args.patience, args.min_delta, args.stop_rule)
    steps_per_epoch = math.ceil(len(data.train.images) / args.batch_size)

    # --- what --resume restores ------------------------------------------------------------------
    run = Run(args, fixed=fixed, model=model, optimizer=optimizer, stopping=stopping)
    run.start()  # from last.pt under --resume
    net = distributed.wrap(model)  # DistributedDataParallel under torchrun, else the model itself

    # --- training --------------------------------------------------------------------------------
    while run.epoch < args.epochs and not run.stopped:
        model.train()
        for batch in run.batches(data.train):  # one shuffled epoch
            lr = args.lr * (1 - (run.epoch + run.step / steps_per_epoch) / args.epochs)
            optimizer.param_groups[0]["lr"] = lr  # linear decay to zero
            images, targets, count, weight = distributed.shard(*batch)  # this rank's share
            optimizer.zero_grad()
            with cli.autocast(args):
                loss = loss_fn(net(images), targets)
            (weight * loss).backward()  # the weight is 1 in a single process
            optimizer.step()
            terms = loss_fn.terms if args.perceptual else {}  # mse, vgg2, ..., vgg28
            run.step_done({"loss": loss, **terms}, count)  # saves and exits after a signal

        lr = optimizer.param_groups[0]["lr"]
        val = evaluate(model, loss_fn, data.val, args)
        run.log_epoch(len(data.train.images), val, lr)  # one line on stdout
        run.stopped = stopping.step(val["loss"])
        run.save()  # last.pt, and best.pt after the epoch with the lowest validation loss

    # --- the test set, used here for the first time ----------------------------------------------
    run.load_best()
    write_report(run, models, loss_fn, data)


if __name__ == "__main__":
    cli.run(main)  # a user's mistake: one line and exit code 2
