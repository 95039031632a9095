"""Train the report's first model, two linear layers and a sigmoid, to imitate the chain
Resize(28) -> Grayscale -> horizontal flip -> vertical flip on CIFAR-10.

    python train_fc.py                                     train until early stopping
    python train_fc.py --init closed-form --epochs 0       the same net without training
    python train_fc.py --data synthetic --test-data cifar10
    python train_fc.py --resume                            go on after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_fc.py   one process per GPU

Expected on CIFAR-10: 99.8 % of the test images at a cosine similarity of 0.95 and over 90 % at
0.99, in a minute or two on two CPU cores (results/train-fc.json); 98 % after the first epoch.
"""

if __name__ == "__main__":  # Ctrl-C during the imports ends the script without a traceback
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import nn

from common import cli, distributed
from common.checkpoints import claim
from common.data import load_data
from common.early_stopping import EarlyStopping
from common.evaluate import evaluate
from common.models import FullyConnected, closed_form_
from common.report import write_report
from common.run import Run


def main() -> None:
    # --- flags, device, data ---------------------------------------------------------------------
    parser = cli.parser(__doc__, epochs=500, batch_size=450, lr=2.5e-4)
    parser.add_argument("--init", choices=["random", "closed-form"], default="random")
    args = cli.parse(parser, "fc")  # the default of --out: runs/fc
    torch.manual_seed(args.seed)
    device = distributed.init(args)
    claim(args)  # --out: one run at a time
    data = load_data(args, device)  # .train, .val, .test: uint8 images and their targets

    # --- model, loss, optimizer, schedule, early stopping ----------------------------------------
    model = FullyConnected().to(device)
    if args.init == "closed-form":
        closed_form_(model, *data.train)
    loss_fn = nn.MSELoss()

    # The second layer learns at 128 times the rate of the first: 98 % then takes one epoch of
    # 100 batches. At one rate for both it took over four times as many batches.
    _, first, second, _ = model.layers
    groups = [{"params": first.parameters()}, {"params": second.parameters(), "lr": 128 * args.lr}]
    # beta2 = 0.95 and not 0.999: the gradients shrink fast in the first epochs, and the second
    # moment must follow.
    optimizer = torch.optim.Adam(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=2, threshold=0.01
    )
    stopping = EarlyStopping(args.patience, args.min_delta, args.stop_rule)

    # --- what --resume restores ------------------------------------------------------------------
    run = Run(args, model=model, optimizer=optimizer, scheduler=scheduler, stopping=stopping)
    run.start()  # from last.pt under --resume
    net = distributed.wrap(model)  # DistributedDataParallel under torchrun, else the model itself

    # --- training --------------------------------------------------------------------------------
    while run.epoch < args.epochs and not run.stopped:
        model.train()
        for batch in run.batches(data.train):  # one shuffled epoch
            images, targets, count, weight = distributed.shard(*batch)  # this rank's share
            optimizer.zero_grad()
            with cli.autocast(args):
                loss = loss_fn(net(images), targets)
            (weight * loss).backward()  # the weight is 1 in a single process
            optimizer.step()
            run.step_done({"loss": loss}, count)  # saves and exits after a signal

        lr = optimizer.param_groups[0]["lr"]
        val = evaluate(model, loss_fn, data.val, args)
        run.log_epoch(len(data.train.images), val, lr)  # one line on stdout
        scheduler.step(val["loss"])
        run.stopped = stopping.step(val["loss"])
        run.save()  # last.pt, and best.pt after the epoch with the lowest validation loss

    # --- the test set, used here for the first time ----------------------------------------------
    run.load_best()
    write_report(run, {"fully connected net": model}, loss_fn, data)


if __name__ == "__main__":
    cli.run(main)  # a user's mistake: one line and exit code 2
