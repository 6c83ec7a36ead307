"""How published work divides the Kermany set into train, validation and test: our way, and others to compare with."""

from __future__ import annotations

import logging

import datasets
import numpy as np
from sklearn.model_selection import train_test_split

from cxr_backbone.data.splits import all_films, complete_splits, folds_by_patient

logger = logging.getLogger(__name__)

PROTOCOLS = ("official", "pooled_by_image", "pooled_by_patient", "selected_on_test")
OFFICIAL_VALIDATION = {"val", "validation"}
POOLED_TEST_SHARE = 2134 / 5856
PARTS, TEST_PARTS = 11, 4  # by patient, and about that share: some 2,130 films


def divide(
    official: datasets.DatasetDict, protocol: str, *, num_folds: int, fold: int, seed: int
) -> datasets.DatasetDict:
    """Train, validation and test by a protocol, everything stratified by subtype.

    Args:
        official: the splits as published, with `patient_id`, `image_id` and `subtype`.
        protocol: one of
            official: the official test split. Validation is carved from train by patient; the official validation
                split is left out, since 16 films are too few to choose anything by.
            pooled_by_image: all splits are pooled and dealt out again film by film, 3,722 to train and 2,134 to test
                (of fewer films, as large a share); validation is carved from these 3,722 film by film as well. So a
                child's films stand on all sides. Stephen et al., Journal of Healthcare Engineering 2019.
            pooled_by_patient: the same by patient: about these shares, and no child on two sides.
            selected_on_test: the official train split, and VALIDATION IS THE OFFICIAL TEST SPLIT: the model is chosen
                by the films that it is then measured on, so what it scores there is no test figure. A. Sagar's
                notebook.
            `pooled_by_image` and `selected_on_test` flatter a model. They are for comparison with figures that were
            published under them, and for nothing else.
        num_folds, fold: which part of train becomes validation, see `complete_splits`.
        seed: decides validation, and what is dealt out again.

    Raises:
        ValueError: an unknown protocol, too few films or patients, or as `complete_splits`.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is none; expected one of {', '.join(PROTOCOLS)}.")
    group_by = "patient_id"
    if protocol == "pooled_by_image":
        logger.warning("FILMS ARE SPLIT BY IMAGE: a child's films stand on several sides. For comparison only.")
        given, group_by = _pooled_by_image(all_films(official), seed), "image_id"
    elif protocol == "pooled_by_patient":
        given = _pooled_by_patient(all_films(official), seed)
    else:
        given = _without_validation(official)
    if protocol == "selected_on_test":
        logger.warning(
            "VALIDATION IS THE TEST SPLIT: the model is chosen by the films that it is measured on, so what it scores "
            "there is no test figure. For comparison only."
        )
        given["validation"] = given["test"]
    return complete_splits(given, num_folds=num_folds, fold=fold, seed=seed, stratify_by="subtype", group_by=group_by)


def _without_validation(official: datasets.DatasetDict) -> datasets.DatasetDict:
    for name in sorted(OFFICIAL_VALIDATION & official.keys()):
        num_films = len(official[name])
        logger.info("Leaving out the official validation split of %d films: too few to choose by.", num_films)
    return datasets.DatasetDict({name: films for name, films in official.items() if name not in OFFICIAL_VALIDATION})


def _pooled_by_image(films: datasets.Dataset, seed: int) -> datasets.DatasetDict:
    num_test = round(POOLED_TEST_SHARE * len(films))
    train, test = train_test_split(
        np.arange(len(films)), test_size=num_test, stratify=films["subtype"][:], random_state=seed
    )
    return datasets.DatasetDict(train=films.select(np.sort(train)), test=films.select(np.sort(test)))


def _pooled_by_patient(films: datasets.Dataset, seed: int) -> datasets.DatasetDict:
    is_test = folds_by_patient(films["patient_id"][:], films["subtype"][:], PARTS, seed) < TEST_PARTS
    return datasets.DatasetDict(
        train=films.select(np.flatnonzero(~is_test)), test=films.select(np.flatnonzero(is_test))
    )
