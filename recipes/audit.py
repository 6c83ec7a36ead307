"""Let a data set tell on itself: what stands in two splits, what is there twice, what gives the label away.

    python recipes/audit.py recipes/configs/pneumonia.yaml --data.source path/to/chest_xray --run.output_dir runs/audit

Prints a summary; run.output_dir gets audit.json and audit.html, which shows films of the data set. The exit status is
2 if a patient or a film stands in two splits and data.allow_leaks doesn't say that it may, and 1 if nothing can be
audited. Films that can't be read are listed and left out. The configuration is that of a training, and what was decoded
here is not decoded again there.
"""

import logging
import sys

from cxr_backbone.data.audit import audit, leaks, summary
from cxr_backbone.training.arguments import parse_arguments
from cxr_backbone.training.films import decode_films, open_films
from cxr_backbone.training.state import RunDirectory


def main() -> None:
    try:
        arguments = parse_arguments(sys.argv[1:])
        arguments.data.unreadable = "skip"
        run = RunDirectory(arguments.run.output_dir)
        settings = {"image_size": arguments.model.image_size, "seed": arguments.run.seed}
        films = decode_films(open_films(arguments.data, **settings), arguments.data, **settings)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"audit.py: {' '.join(str(error).split())}")
    report = audit(films.splits, films.unreadable)
    run.write_audit(films, report)
    print(summary(report))
    print(f"The page with pictures: {run.path / 'audit.html'}")
    if leaks(report).keys() - set(arguments.data.allow_leaks):
        sys.exit(2)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
