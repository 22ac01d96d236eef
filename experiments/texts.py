"""Has a model learned to find the key, or only to ignore this hay? Other texts tell.

    python -m experiments.texts --load out/passkey-*.pt

For each text it prints the table of passkey.py and leaves its cells in OUT/texts-NAME.csv."""
if not __package__:
    raise SystemExit("run it from the project's folder: python -m experiments.texts --load FILE")

from pathlib import Path

from passkey import HAY, NEEDLE, length, listed, table
from train import Parser, run_command, set_up, whole

DECOY = "The blue info is {1}. Find it. {1} is the blue info."    # {1}: the key backwards
TEXTS = {    # what it is, needle, hay, digits of a key if not as in training
    "paper": ("the paper's text", NEEDLE, "paper", None),
    "words": ("random words of the prompt instead of sentences", NEEDLE, "words", None),
    "6-digits": ("keys of six digits", NEEDLE, "paper", 6),
    "border": ("at 1K the answer begins a segment", f"{NEEDLE} Here we go.", "paper", None),
    "decoy": ("a second number behind the key", f"{NEEDLE} {HAY} {DECOY}", "paper", None),
    "twice": ("the needle twice, a paragraph apart", f"{NEEDLE} {HAY} {NEEDLE}", "paper", None)}

def main():
    parser = Parser("Look for pass keys in other texts than the paper's.")
    add = parser.add_argument
    add("--load", type=Path, nargs="+", required=True, metavar="FILE",
        help="models that passkey.py has trained")
    add("--lengths", type=listed(length), default="1K,8K,32K", help="in tokens")
    add("--depths", type=listed(whole(0, 100)), default="0,50,100", help="of the key, in %%")
    add("--keys", type=whole(1, 500), default=20, help="keys per cell")
    add("--eval-seed", type=whole(0), default=1234, help="draws these keys")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the tables")
    add("--threads", type=whole(1, 1024), help="cores to use; without it PyTorch decides")
    args = parser.parse_args()
    set_up(threads=args.threads, out=args.out, files=[f"texts-{name}.csv" for name in TEXTS],
           inputs=args.load)
    depths = [depth / 100 for depth in args.depths]
    for name, (what, needle, hay, digits) in TEXTS.items():
        print(f"\n{name}: {what}", end="", flush=True)
        table(args.load, args.lengths, depths, args.keys, args.eval_seed, "cpu",
              args.out / f"texts-{name}.csv", needle, hay, digits)

if __name__ == "__main__":
    run_command(main)
