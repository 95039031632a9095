"""Train the report's first model, two linear layers and a sigmoid, to imitate the chain
Resize(28) -> Grayscale -> horizontal flip -> vertical flip on CIFAR-10; or a linear model.

    python train_fc.py                                     train until early stopping
    python train_fc.py --init closed-form --epochs 0       the same net without training
    python train_fc.py --data synthetic --test-data cifar10
    python train_fc.py --model separable                   1,795 weights that become the chain
    python train_fc.py --model separable --init closed-form --epochs 0
    python train_fc.py --resume                            continue after Ctrl-C or a crash
    torchrun --standalone --nproc_per_node=2 train_fc.py   one process per GPU

Expected on CIFAR-10: 99.8 % of the test images at a cosine similarity of 0.95 and over 94 % at
0.99, in a minute or two on two CPU cores (results/README.md); 98 % within the first epoch.
"""

if __name__ == "__main__":  # Ctrl-C during the imports ends the script without a traceback
    import signal

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
from collections import namedtuple

import torch
from torch import nn

from common import cli, distributed
from common.checkpoints import claim
from common.data import load_data
from common.early_stopping import EarlyStopping
from common.evaluate import evaluate
from common.models import FullyConnected, Linear, Separable, closed_form_
from common.report import write_report
from common.run import Run

# How each model is trained. The rate rises in a tenth of `decay` epochs to lr * 0.9 ** power, then
# falls to lr * 1e-3 ** power. FullyConnected cannot represent the chain: its loss ends far above
# zero, and early stopping ends its training. The others can; their loss falls while the rate does.
Recipe = namedtuple("Recipe", "net label batch_size lr decay power epochs min_delta")
RECIPES = {
    "fc": Recipe(FullyConnected, "fully connected net", 100, 3e-3, 20, 1, 500, 1e-6),
    "linear": Recipe(Linear, "linear layer", 100, 1e-3, 12, 2, 12, 0.0),
    "separable": Recipe(Separable, "separable net", 32, 2e-2, 6, 4, 6, 0.0),
}


def main() -> None:
    # --- flags, device, data ---------------------------------------------------------------------
    model_flag = cli.Parser(add_help=False)  # read first: the other flags' defaults depend on it
    cli.choice(model_flag, "--model", *RECIPES)
    recipe = RECIPES[model_flag.parse_known_args()[0].model]
    defaults = {key: getattr(recipe, key) for key in ("epochs", "batch_size", "lr", "min_delta")}
    parser = cli.parser(__doc__, parents=[model_flag], **defaults)
    cli.choice(parser, "--init", "random", "closed-form")
    args = cli.parse(parser, "fc")  # the default of --out: runs/fc, runs/fc-synthetic, ...
    torch.manual_seed(args.seed)
    device = distributed.init(args)
    claim(args)  # --out: one run at a time
    data = load_data(args, device)  # .train, .val, .test: uint8 images and their targets

    # --- model, loss, optimizer, schedule, early stopping ----------------------------------------
    model = recipe.net().to(device)
    if args.init == "closed-form":
        closed_form_(model, *data.train)
    elif args.model == "fc":
        with torch.no_grad():  # random weights for fine detail are never unlearned: start small
            model.layers[1].weight.mul_(0.1)
    loss_fn = nn.MSELoss()

    if args.model == "separable":
        # Photographs hold little fine detail, so the gradient for it is small. Muon makes all
        # singular values of a step equal; Adam ended with a largest error 1,000 times as large.
        optimizer = torch.optim.Muon(model.parameters(), args.lr, weight_decay=0, momentum=0.95)
    else:
        groups = [{"params": layer.parameters()} for layer in model.layers[1:3]]
        groups[-1]["lr"] = (6 if args.model == "fc" else 1) * args.lr  # of FC's second layer
        optimizer = torch.optim.Adam(groups, args.lr, betas=(0.95, 0.99), fused=True)
    steps = recipe.decay * math.ceil(len(data.train.images) / args.batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, 10 * (n + 1) / steps) * max(1 - n / steps, 1e-3) ** recipe.power
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
            scheduler.step()
            run.step_done({"loss": loss}, count)  # saves and exits after a signal

        lr = optimizer.param_groups[0]["lr"]
        val = evaluate(model, loss_fn, data.val, args)
        run.log_epoch(len(data.train.images), val, lr)  # one line on stdout
        run.stopped = stopping.step(val["loss"])
        run.save()  # last.pt, and best.pt after the epoch with the lowest validation loss

    # --- the test set, used here for the first time ----------------------------------------------
    run.load_best()
    write_report(run, {recipe.label: model}, loss_fn, data)


if __name__ == "__main__":
    cli.run(main)  # a user's mistake: one line and exit code 2
