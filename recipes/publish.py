"""Publish a finished run on the Hub: the model, its card and its figures, as one commit.

    python recipes/publish.py --run runs/pneumonia --repo_id org/cxr-inception [--private] [--create_pr] \\
        [--overwrite] [--float16]
    python recipes/publish.py --run runs/pneumonia --repo_id org/cxr-inception --dry_run

Everything that is published stands in <run>/hub first; --dry_run stops there, without the network. Films, predictions
and the ids of patients are no part of it. It needs a token that may write: `hf auth login`, or HF_TOKEN.
"""

import argparse
import sys
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from cxr_backbone.card import read_run_file
from cxr_backbone.hub import check_push_access, publish
from cxr_backbone.package import assemble, check_worth_publishing

ROOT = Path(__file__).parents[1]


def main() -> None:
    given = parse_command_line(sys.argv[1:])
    disable_progress_bar()  # of loading
    try:
        settings = read_run_file(Path(given.run) / "config.yaml", ("data.permute_labels", "data.protocol"))
        check_worth_publishing(settings["data"])
        if not given.dry_run:
            check_push_access(given.repo_id, private=given.private, create_pr=given.create_pr)
        folder = assemble(
            given.run,
            repo_id=given.repo_id,
            template=ROOT / "model_card.md",
            licence=ROOT / "LICENSE",
            float16=given.float16,
        )
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.relative_to(folder)}")
        if given.dry_run:
            print(f"Not published (--dry_run). What would be is in {folder}")
            return
        url = publish(
            folder, given.repo_id, private=given.private, create_pr=given.create_pr, overwrite=given.overwrite
        )
    except (ValueError, OSError) as error:
        sys.exit(f"publish.py: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("publish.py: interrupted. Run the same command again to go on.")
    print(f"Published: {url}")


def parse_command_line(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="run directory of a finished training")
    parser.add_argument("--repo_id", required=True, help="org/name on the Hub")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made now")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of a commit on main")
    parser.add_argument("--overwrite", action="store_true", help="replace a published model even if it is better")
    parser.add_argument("--float16", action="store_true", help="store the weights in half as many bytes")
    parser.add_argument("--dry_run", action="store_true", help="write <run>/hub, publish nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
