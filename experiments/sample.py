"""Continue a text with a trained language model, byte by byte.

    python -m experiments.sample --load out/lm-delta-seed0.pt
"""

import codecs

import torch

import common
import train
from infini import sample, stream


def prompt(text):
    """Read a text that is not empty, as an argument's type."""
    if not text:
        raise ValueError
    return text


def load_byte_model(paths, device):
    """Load the one model. Raises ValueError if there are more, or it is not of bytes."""
    if len(paths) > 1:
        raise ValueError("--load takes one model here")
    [path] = paths
    model, _ = train.load_model(path, device)
    if model.config.vocab_size != 256:
        raise ValueError(f"{path} is not a model of bytes")
    return model


def draw_bytes(model, text, n, temperature, top_p, generator):
    """Yield the next n bytes of a text, one by one. Each costs the same."""
    given = torch.tensor([list(text)], device=model.head.weight.device)    # (1, T)
    state = None
    for _ in range(n):
        logits, state = stream(model, given, state)
        given = sample(logits, temperature, top_p, generator)              # (1, 1)
        yield given.item()


def main():
    parser = common.new_parser("Continue a text with a trained language model.")
    common.add_files_argument(parser, "a language model of train.py")
    add = parser.add_argument
    add("--prompt", type=prompt, default="def main():\n", help="text to continue")
    add("--bytes", type=common.count, default=500, help="to write")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest byte")
    add("--top-p", type=common.share, default=0.95, help="share of likely bytes to draw")
    add("--seed", type=common.seed, default=0, help="of what is drawn")
    add("--device", type=common.usable_device, default="cpu", help="or cuda, or mps")
    args = parser.parse_args()

    model = load_byte_model(args.load, args.device)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    text = args.prompt.encode()
    drawn = draw_bytes(model, text, args.bytes, args.temperature, args.top_p, generator)

    # A character may take several bytes. It is shown when they are all there.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(args.prompt, end="", flush=True)
    for byte in drawn:
        print(decoder.decode(bytes([byte])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    common.run_command(main)
