"""Why are keys lost in a long text? Because the needle's share of the memory's answer shrinks.

    python -m experiments.dilution --load out/passkey-*.pt

The memory answers with a mean of all values, weighted by sigma(q) sigma(k)^T. Every token of hay
has some weight, however small, and after enough of them they outweigh the needle."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.dilution --load FILE")

from pathlib import Path

import torch

import passkey
from experiments.curves import draw_lines
from infini import Memory, retrieve, sigma, stream
from passkey import HAY, INTRO, encode, one_key, paragraphs, print_row
from train import Parser, run_command, set_up, whole


@torch.no_grad()
def needle_shares(model, task, lengths):
    """Compute the share of what the memory answers to the question that comes from the needle.
    The needle stands at the start of an input of n tokens, n in `lengths`. Its share is that of
    its tokens' sigma(k) in sigma(q) z at the question's last token. The delta rule's M is no plain
    sum, and so this is a share of the normaliser only. Yields n and the shares, (layers, heads)."""
    inputs = {}    # layer -> its x in the last call, (1, T, d_model)
    hooks = [block.attention.register_forward_pre_hook(
        lambda layer, given: inputs.update({layer: given[0]})) for block in model.blocks]

    def read(text, state):
        return stream(model, text[None].to(model.embedding.weight.device), state)[1]
    try:
        state, question = read(encode(INTRO), None), encode(task.question)
        state, n_read = read(encode(task.needle), state), 0
        needle = [sigma(layer.project(x)[1]).sum(2) for layer, x in inputs.items()]  # (1, H, d_key)
        for n in sorted(lengths):
            total = paragraphs(n, task)
            if total > n_read:
                state, n_read = read(encode(HAY).repeat(total - n_read), state), total
            before = read(question[:-1], state)
            read(question[-1:], before)
            yield n, torch.stack([
                retrieve(layer.project(x)[0], Memory(sk.unsqueeze(-1), s.memory.z))[0, :, 0, 0]
                for (layer, x), sk, s in zip(inputs.items(), needle, before)])
    finally:
        for hook in hooks:
            hook.remove()


def main():
    parser = Parser("Show how thin a key gets in the memory of trained models.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", required=True, metavar="FILE",
        help="models that passkey.py has trained")
    add("--lengths", type=passkey.listed(passkey.length), help="in tokens",
        default="128,512,2K,8K,32K,128K,512K")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the picture")
    add("--device", default="cpu", help="or cuda, or mps")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(args.device, args.threads, args.out)
    if args.lengths[0] < 128:    # else the needle has not entered the memory yet
        raise ValueError(f"--lengths was {args.lengths[0]}, must be 128 or more")
    models = [passkey.load_for_table(path, args.device)[:2] for path in args.load]
    models = [(model, who) for model, who in models if model.config.attention == "infini"]
    if not models:
        raise ValueError("--load was of models without a memory, must have one with a memory")
    print_row("Needle's share in %", [passkey.short(n) for n in args.lengths])
    curves = {}
    for model, who in models:
        name = " ".join(map(str, who))
        name += f" ({len(curves) + 1})" * (name in curves)    # a second one of this name
        shares = [100 * share.flatten() for _, share in
                  needle_shares(model, one_key("9054"), args.lengths)]
        best = shares[0].argmax()    # the head in which the share is largest at first
        shares = [share[best].item() for share in shares]
        print_row(name, [f"{share:.3g}" for share in shares])
        curves[name] = args.lengths, shares
    draw_lines(curves, args.out / "dilution.png", "tokens in the input, the needle first",
               "needle's share (%)")


if __name__ == "__main__":
    run_command(main)
