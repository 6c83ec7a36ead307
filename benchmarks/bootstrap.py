"""How long do intervals of AUROC and AUPRC from resampled patients take? Ours, and a loop over scikit-learn.

python benchmarks/bootstrap.py [--films 624 100000] [--resamples 2000] [--peer_resamples 20]

One process; ask for one thread with OMP_NUM_THREADS=1. The peer is what one would write first: for each resample,
roc_auc_score and average_precision_score of the films drawn, each as often as its patient. It takes the first resamples
of ours only, and its seconds are scaled to all of them. Its figures and ours of these are compared.
"""

import argparse
import platform
import time
from importlib.metadata import version

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from cxr_backbone.evaluation.bootstrap import RESAMPLES, PatientBootstrap, number_patients
from cxr_backbone.evaluation.report import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", nargs="+", type=int, default=[624, 100_000], help="a row of the table each")
    parser.add_argument("--resamples", type=int, default=RESAMPLES)
    parser.add_argument("--peer_resamples", type=int, default=20)
    arguments = parser.parse_args()

    rows = []
    for films in arguments.films:
        patient_ids, truth, scores = draw_films(films)
        start = time.perf_counter()
        bootstrap = PatientBootstrap(patient_ids, resamples=arguments.resamples)
        ours = np.stack(bootstrap.rank_figures(np.arange(films), truth, scores))  # (2, resamples)
        seconds = time.perf_counter() - start
        counts = bootstrap.counts[: arguments.peer_resamples, number_patients(patient_ids)]  # (resamples, films)
        start = time.perf_counter()
        peer = sklearn_loop(counts, truth, scores)
        peer_seconds = (time.perf_counter() - start) * arguments.resamples / len(counts)
        difference = np.abs(peer - ours[:, : len(counts)]).max()
        cells = [f"{seconds:.2f}", f"{peer_seconds:.1f}", f"{peer_seconds / seconds:.0f}", f"{difference:.0e}"]
        rows.append([f"{films:,}", f"{bootstrap.num_patients:,}", *cells])
    print(f"Seconds for AUROC and AUPRC of {arguments.resamples:,} resamples (scikit-learn: ", end="")
    print(f"of {arguments.peer_resamples:,}, scaled):\n")
    header = ["films", "patients", "s ours", "s scikit-learn", "times as fast", "largest difference of a figure"]
    print(markdown_table(header, rows))
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "scikit-learn"))
    print(f"\nPython {platform.python_version()}, {packages}.")


def draw_films(films: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """patient_ids, truth and scores: about three films a patient, three in ten positive, an AUROC of about .86."""
    generator = np.random.default_rng(0)
    patient_ids = [str(patient) for patient in generator.integers(films * 3 // 10, size=films)]
    truth = generator.random(films) < 0.3
    return patient_ids, truth, 1.5 * truth + generator.normal(size=films)


def sklearn_loop(counts: np.ndarray, truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """AUROC and AUPRC (2, resamples) of films that were drawn as often as `counts` (resamples, films) says."""
    figures = np.empty((2, len(counts)))
    for resample, drawn in enumerate(counts):
        films = np.repeat(np.arange(len(truth)), drawn)
        figures[0, resample] = roc_auc_score(truth[films], scores[films])
        figures[1, resample] = average_precision_score(truth[films], scores[films])
    return figures


if __name__ == "__main__":
    main()
