"""Trains the report's second model, four 4x4 convolutions, to imitate the chain
Resize(28) -> Grayscale -> horizontal flip -> vertical flip on CIFAR-10, with MSE or with MSE plus
a VGG16 perceptual loss.

    python train_cnn.py                        the report's net: it cannot learn the flips
    python train_cnn.py --flip fixed           behind a fixed flip of its input it learns the rest
    python train_cnn.py --perceptual           the perceptual loss at 224 px, made for a GPU
    python train_cnn.py --perceptual --vgg-size 64 --precision bf16        on a CPU with AMX

Expected on CIFAR-10: behind the fixed flip 99.9 % of the test images at a cosine similarity of
0.95; with learned flips 31 %, where a constant gray image has 33 % (results/train-cnn-*.json). An
epoch of 45,000 images takes three to four minutes on two CPU cores, with --precision bf16 on cores
that have AMX 40 seconds, and there with the perceptual loss at 64 px seven minutes.
"""

import os
from pathlib import Path

from torch import nn

from common import training
from common.models import ConvNet
from common.perceptual import PerceptualLoss


def main() -> None:
    p = training.parser(__doc__, epochs=5, batch_size=64, lr=1e-3)
    p.add_argument("--perceptual", action="store_true", help="add the VGG16 loss to the MSE")
    p.add_argument(
        "--vgg-weights",
        default=os.environ.get("VGG16_WEIGHTS", "imagenet"),
        metavar="{imagenet,random,PATH}",
        help="default: $VGG16_WEIGHTS, else imagenet",
    )
    p.add_argument("--vgg-size", type=training.number(int, 32), default=224, help="pixels")
    p.add_argument("--flip", choices=["learned", "fixed"], default="learned")
    args = training.parse(p, lambda args: "runs/cnn-perceptual" if args.perceptual else "runs/cnn")
    if args.dry_run:
        args.vgg_size = 32
    loss_fn = PerceptualLoss(args.vgg_weights, args.vgg_size) if args.perceptual else nn.MSELoss()
    device, data = training.setup(args)

    model = ConvNet(args.flip).to(device)
    loss_fn = loss_fn.to(device)

    log = training.Log(args)
    state = training.fit(model, loss_fn, data, args, log, decay=True)
    training.report(model, loss_fn, data, args, state, log, label(args.perceptual), others(args))


def label(perceptual: bool) -> str:
    """What the model is called in titles."""
    return "CNN, perceptual loss" if perceptual else "CNN, MSE"


def others(args) -> dict[str, ConvNet]:
    """The net trained with the other loss, where its folder lies beside --out and its flip is the
    same: the two are then shown side by side, as in the report's figure 4."""
    path = Path(args.out).with_name("cnn" if args.perceptual else "cnn-perceptual") / "best.pt"
    model = ConvNet(args.flip).to(args.device)
    if not path.exists() or training.load_checkpoint(path, model)["args"]["flip"] != args.flip:
        return {}
    return {label(not args.perceptual): model}


if __name__ == "__main__":
    training.run(main)
