"""Has a model learned to find the key, or only to ignore this hay? Other texts tell.

    python -m experiments.texts --load out/passkey-*.pt

For each text it prints the table of passkey.py, and leaves the cells in OUT/texts-NAME.csv.
"""

from dataclasses import dataclass

import common
import passkey
from passkey import DIGITS, HAY, NEEDLE, Search

DECOY = "The blue info is {1}. Find it. {1} is the blue info."    # {1}: the key backwards


@dataclass(frozen=True)
class Text:
    """Says in what a text differs from the paper's."""

    what: str
    needle: str = NEEDLE
    hay: str = "paper"
    digits: int = DIGITS


TEXTS = {
    "paper": Text("the paper's text"),
    "words": Text("random words of the prompt instead of sentences", hay="words"),
    "6-digits": Text("keys of six digits", digits=6),
    "border": Text("at 1K the answer begins a segment", f"{NEEDLE} Here we go."),
    "decoy": Text("a second number behind the key", f"{NEEDLE} {HAY} {DECOY}"),
    "twice": Text("the needle twice, a paragraph apart", f"{NEEDLE} {HAY} {NEEDLE}"),
}


def make_search(text, args):
    """Say what is looked for in a text. Raises ValueError if there are not so many keys."""
    search = Search(args.lengths, args.depths, args.keys, args.eval_seed,
                    digits=text.digits, needle=text.needle, hay=text.hay)
    search.tasks()    # draws the keys
    return search


def main():
    parser = common.new_parser("Look for pass keys in other texts than the paper's.")
    common.add_files_argument(parser, "models that passkey.py has trained")
    passkey.add_search_arguments(parser, lengths="1K,8K,32K")
    common.add_shared_arguments(parser, device=False)
    args = parser.parse_args()
    common.set_threads(args.threads)

    searches = {name: make_search(text, args) for name, text in TEXTS.items()}
    for name, search in searches.items():
        print(f"\n{name}: {TEXTS[name].what}")
        passkey.table(args.load, search, args.out / f"texts-{name}.csv")


if __name__ == "__main__":
    common.run_command(main)
