"""Each claim of the report with the measurement of this repository, where every verdict is
computed; the findings of README; other libraries beside the operator."""

from statistics import median
from textwrap import TextWrapper

from common.timing import BATCHED, SEQUENTIAL
from results.tables import (
    GPU,
    RESULTS,
    accuracy,
    bench,
    bench_tables,
    command,
    lines,
    micros,
    place,
    row,
    run,
    seconds,
    share,
    speed,
)


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def findings() -> str:
    """What the measurements say, with the commands that give them."""
    fc, closed, separable = run("fc"), run("fc-closed-form"), run("fc-separable")
    learned, fixed, both = (run(n, GPU) for n in ("cnn", "cnn-fixed", "cnn-fixed-perceptual"))
    card = bench(GPU)["environment"]["gpu"]
    fused = row("fused", "tensor", GPU)
    photos = [r for r in bench(GPU)["chains"] if r["protocol"] == "eval" and r["batch"] > 1]
    ours, theirs = (
        min(r["us_per_image"] for r in photos if r["name"].startswith(library))
        for library in ("fuse", "torchvision")
    )
    times = {name: row(name, "tensor")["us_per_image"] for name in ("fc", BATCHED, "fused")}

    def ratio(name: str, other: str) -> str:
        return f"{times[name] / times[other]:.2f}"

    def right(result: dict) -> str:
        return share(result["test"]["accuracy_0.95"])

    sentences = (
        f"In batches the FC net takes {ratio('fc', BATCHED)} times the time of torchvision's chain "
        f"and {ratio('fc', 'fused')} times that of the fused operator, which is exact "
        "(`bench.py --runs 30`).",
        f"The FC net reaches cosine 0.95 on {right(fc)} of the images (`{command(fc)}`), its "
        f"closed form without training on {right(closed)} (`{command(closed)}`), and a constant "
        f"gray image on {share(fc['floor']['accuracy_0.95'])}.",
        f"The report's CNN reaches it on {right(learned)} (`{command(learned)}`): its receptive "
        "field of 13x13 holds the mirrored pixel only at the centre. Behind a fixed flip it "
        f"reaches it on {right(fixed)}, with a PSNR of {fixed['test']['psnr']:.1f} dB "
        f"(`{command(fixed)}`), and with the perceptual loss on {right(both)}, with "
        f"{both['test']['psnr']:.1f} dB "
        f"(`{command(both)}`; all on a GPU).",
        "A net of the chain's own shape, 1,795 weights, learns it in "
        f"{seconds(separable['seconds'])} to a largest error of "
        f"{separable['test']['max_abs_error']:.1g} (`{command(separable)}`); from 16 images it "
        f"needs no gradient (`{command(run('fc-separable-closed-form'))}`).",
        f"On an {card} the operator takes {1e3 * fused['us_per_image']:.2g} ns an image in one "
        f"batch, {fused['speedup']:.3g} times as fast as torchvision and at "
        f"{100 * fused['share_of_copy']:.0f} % of a copy's bytes a second; in batches of "
        f"photographs `fuse` is {theirs / ours:.2g} times as fast as torchvision's fastest form "
        "(`bench.py --runs 30 --device cuda`).",
    )
    wrap = TextWrapper(100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    return "".join(f"{wrap.fill(sentence)}\n" for sentence in sentences)


def beside_mse(both: dict) -> tuple[str, str]:
    """A CNN trained with the perceptual loss beside one trained with MSE alone: how near each comes
    to the test images, and whether the first comes nearer."""
    (mse,) = both["others"].values()
    terms = [f"vgg{layer}" for layer in (2, 7, 14, 21, 28)]
    near, far = (sum(t[term] for term in terms) for t in (both["test_terms"], mse["terms"]))
    ours = both["test"]
    return (
        f"VGG at {both['args']['vgg_size']} px, {both['data']['train']:,} images: PSNR "
        f"{ours['psnr']:.2f} dB, with MSE alone {mse['psnr']:.2f} dB; VGG distance {near:.3g} and "
        f"{far:.3g}; cosine 0.95 {share(ours['accuracy_0.95'])} and {share(mse['accuracy_0.95'])}, "
        f"0.99 {share(ours['accuracy_0.99'])} and {share(mse['accuracy_0.99'])}",
        f"{verdict(ours['accuracy_0.95'] > mse['accuracy_0.95'])} at cosine 0.95, "
        f"{verdict(near < far)} in its own distance, {verdict(ours['psnr'] > mse['psnr'])} in PSNR",
    )


def claims() -> str:
    fc, window, closed = run("fc"), run("fc-window"), run("fc-closed-form")
    learned, fixed, whole = run("cnn"), run("cnn-fixed-3000"), run("cnn-fixed")
    chain, net, cnn = (row(name, "report") for name in (SEQUENTIAL, "fc", "cnn"))
    loader, batched, fused = (row(name, "report") for name in ("copy", BATCHED, "fused"))
    both, there_both = run("cnn-fixed-perceptual"), run("cnn-fixed-perceptual", GPU)
    rate = both["epochs"] * both["data"]["train"] / both["seconds"]
    first, *later = there_both["epoch_seconds"]
    epoch = median(later)
    (near, nearer), (near_there, nearer_there) = beside_mse(both), beside_mse(there_both)
    slower = cnn["mean_s"] / chain["mean_s"]
    there, batches, copying = (row(n, "report", GPU) for n in (SEQUENTIAL, BATCHED, "copy"))
    card = bench(GPU)["environment"]["gpu"]
    every, flipped = run("cnn", GPU), run("cnn-fixed", GPU)

    def on_gpu(name: str) -> tuple[str, str]:
        """The time by the report's clock, and what to say of it."""
        waited, net = row(name, "report", GPU), row(name, "report", GPU, waits=False)
        return seconds(net["mean_s"]), (
            f"on an {card}; {seconds(waited['mean_s'])} when the clock waits for the last kernels, "
            f"{seconds(copying['mean_s'])} of it the loader and the copy. The chain there: "
            f"{seconds(there['mean_s'])} image by image, {seconds(batches['mean_s'])} in the same "
            "batches"
        )

    right = fc["test"]["accuracy_0.95"]
    flips = learned["test"]["accuracy_0.95"] > learned["floor"]["accuracy_0.95"]
    bench_command = "`python bench.py --runs 30`"
    rows = [
        (
            "1: the FC net is over 98 % right at cosine 0.95",
            "98 %",
            share(right),
            f"`{command(fc)}`",
            f"{verdict(right > 0.98)}, after {seconds(fc['seconds_to_98'])} of training; a "
            f"constant gray image gets {share(fc['floor']['accuracy_0.95'])}, the closed form "
            f"{share(closed['test']['accuracy_0.95'])}",
        ),
        (
            "1.3: stop when 10 epochs lower the loss by 0.000001 or less",
            "",
            f"epoch {fc['epochs']}, {seconds(fc['seconds'])}, MSE {fc['test']['mse']:.4g}",
            f"`{command(fc)}`",
            f"keeps epoch {fc['best_epoch']}",
        ),
        (
            "1.3: the variant, the loss 10 epochs ago minus the largest since",
            "",
            f"epoch {window['epochs']}, MSE {window['test']['mse']:.4g}",
            f"`{command(window)}`",
            f"{window['epochs'] - fc['epochs']:+d} epochs; keeps epoch {window['best_epoch']}",
        ),
        (
            "1.4.1: the chain on the CPU",
            "0.754336 s",
            seconds(chain["mean_s"]),
            bench_command,
            f"image by image; in the loader's batches of 100 the same chain takes "
            f"{seconds(batched['mean_s'])}",
        ),
        (
            "1.4.1: the FC net on the CPU is faster than the chain",
            "0.13146 s",
            seconds(net["mean_s"]),
            bench_command,
            f"{verdict(net['mean_s'] < chain['mean_s'])}: {chain['mean_s'] / net['mean_s']:.2g} "
            "times as fast in batches of 100 as the chain image by image, "
            f"{batched['mean_s'] / net['mean_s']:.2g} times as the chain in the same batches. The "
            f"loader alone takes {seconds(loader['mean_s'])}, with the fused operator in place of "
            f"the net {seconds(fused['mean_s'])}",
        ),
        (
            "1.4.1: the FC net on the GPU",
            "0.139562 s",
            on_gpu("fc")[0],
            f"{bench_command[:-1]} --device cuda`",
            f"{on_gpu('fc')[1]}. In the report the GPU is no faster than the CPU: both times "
            "include the loader",
        ),
        (
            "2: the CNN's flips come from the network as a whole",
            "",
            f"{share(learned['test']['accuracy_0.95'])}; fixed flip "
            f"{share(fixed['test']['accuracy_0.95'])}, on more images "
            f"{share(whole['test']['accuracy_0.95'])}. All images, on a GPU: "
            f"{share(every['test']['accuracy_0.95'])}; "
            f"{share(flipped['test']['accuracy_0.95'])}",
            f"`{command(learned)}`, `{command(fixed)}`, `{command(every)}`, `{command(flipped)}`",
            f"{verdict(flips)}: a constant image gets {share(learned['floor']['accuracy_0.95'])}. "
            "An output pixel sees 13 x 13 input pixels (`tests/test_convnet.py`)",
        ),
        (
            "2.2.1: the CNN is slower than all transforms in sequence on the CPU",
            "2.900498 s; perceptual 2.635234 s",
            seconds(cnn["mean_s"]),
            bench_command,
            f"{verdict(slower > 1)}: {slower:.2g} times the chain's time; the training loss "
            "does not change the time",
        ),
        (
            "2.2.1: the CNN on the GPU",
            "0.587102 s; perceptual 0.594008 s",
            on_gpu("cnn")[0],
            f"{bench_command[:-1]} --device cuda`",
            on_gpu("cnn")[1],
        ),
        (
            "2.2.1: 50 minutes an epoch with perceptual loss",
            "RTX 4070, 224 px",
            f"{seconds(epoch)} at {there_both['args']['vgg_size']} px on an {card}; "
            f"{rate:.0f} images/s at {both['args']['vgg_size']} px on this CPU",
            f"`{command(there_both)}`, `{command(both)}`",
            f"{3000 / epoch:.0f} times as fast there, in {there_both['args']['precision']}; the "
            f"first epoch, which includes compilation, takes {seconds(first)}",
        ),
        (
            "2: the perceptual loss is much stronger, pixelwise differences apart",
            "",
            f"on a GPU: {near_there}. On this CPU: {near}",
            f"`{command(there_both)}`, `{command(both)}`",
            f"on a GPU {nearer_there}; on this CPU {nearer}. PSNR is pixelwise; its own distance "
            "is what the loss trains. All behind the fixed flip, each pair trained on the same "
            f"images, on the GPU in {there_both['args']['precision']}, MSE alone in "
            f"{flipped['args']['precision']}",
        ),
    ]
    return lines(["claim", "report", "here", "command", "verdict"], *map(list, rows))


def gpu() -> str:
    """What was measured on a GPU: the methods, the chains on photographs, the trainings."""
    names = "fused", "fused uint8", "copy uint8"
    told = ", ".join(f"`{n}` {100 * row(n, 'tensor', GPU)['share_of_copy']:.0f} %" for n in names)
    photos = bench_tables(lambda heading: "375 x 500" in heading, GPU)
    shares = f"Of the bytes a second of the fastest copy: {told}."
    return "\n".join([speed(GPU, "GPU pipeline"), f"{shares}\n", photos, accuracy(GPU)])


def processors() -> str:
    """The operator on each CPU measured, relative to torchvision's fastest form there."""
    body = []
    for machine in sorted(path.parent.name for path in RESULTS.glob("*/bench-*.json")):
        if bench(machine)["environment"]["gpu"] is None:
            rows = [r for r in bench(machine)["chains"] if r["name"] == "fuse uint8 planar"]
            rows.sort(key=lambda r: (r["protocol"], -r["batch"]))
            rows = [row(name, "tensor", machine) for name in ("fused", "fused uint8")] + rows
            body.append([place(machine), *(f"{r['speedup']:.3g}" for r in rows)])
    head = ["", "fused", "fused uint8", "photographs: eval", "one by one", "random crops",
            "one by one"]  # fmt: skip
    return lines(head, *body)


def libraries() -> str:
    """Other libraries at the study's chain, each at its fastest batch size, beside the operator."""
    timed = [r for r in bench()["rows"] if r["protocol"] == "tensor" and r["median_s"]]
    names = {r["name"] for r in timed if r["peer"]} | {"fused", "fused uint8", BATCHED, SEQUENTIAL}
    body = []
    for r in sorted((row(name, "tensor") for name in names), key=lambda r: r["us_per_image"]):
        text = [r["name"], r["dtype"], str(r["batch"]), micros(r["us_per_image"])]
        text += [f"{r['speedup']:.3g}", f"{255 * r['max_abs_error']:.2g}"]
        if r["peer"]:
            text += [f"{r['mean_levels']:.2g}", share(r["equal_share"]), r["note"]]
        body.append([*text, *[""] * (9 - len(text))])
    head = ["", "takes", "batch", "us per image", f"times as fast as {BATCHED}",
            "largest error in levels", "mean", "equal", "version"]  # fmt: skip
    return lines(head, *body)
