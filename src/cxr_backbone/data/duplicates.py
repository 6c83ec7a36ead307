"""Films that a data set holds more than once: the same pixels, or the same picture stored another way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from cxr_backbone.data.film_table import FilmTable

# Two films are compared where their 64-bit perceptual hashes differ in at most MAX_DIFFERENT_BITS bits, and are near
# duplicates where their thumbnails correlate by MIN_CORRELATION or more. Among 10,142 films (the Kermany set, RSNA's
# normals, an NIH subset) no two different ones of a set correlate above .968 within 6 bits, or above .972 at all.
MAX_DIFFERENT_BITS = 6
MIN_CORRELATION = 0.98

HASHES_PER_BLOCK = 256  # against all the others at once: 140 MB at 112,000 films
THUMBNAILS_PER_BLOCK = 1024

MAX_LISTED_PAIRS = 1000
MAX_PAIRED_FILMS = 4  # of a group, in each split and of each label, that are listed in pairs


def find_duplicates(films: FilmTable) -> dict[str, Any]:
    """Duplicates in a data set, see `group_duplicates`. All films of a group count as duplicates of each other.

    Returns:
        `groups`; `films` in them; `largest_group`; `groups_across_splits`; `contradictory_groups`, whose films bear
        different labels (multi-label: a finding that is present in one and absent in another); `exact` and `near`,
        each with its number of `pairs` and of those `across_splits`; and `listed`: pairs, each with `exact`, both
        `films`, their `correlation`, `across_splits` and `contradictory`. Pairs across splits come first, then
        contradictory ones. At most 1,000 pairs are listed, and of a group at most the first four films of each
        split and label.
    """
    group = group_duplicates(films.pixel_hash, films.perceptual_hash, films.thumbnails)
    groups = _members(group)
    exact, exact_across = _count_pairs(_members(np.unique(films.pixel_hash, return_inverse=True)[1]), films)
    pairs, pairs_across = _count_pairs(groups, films)
    return {
        "groups": len(groups),
        "films": sum(map(len, groups)),
        "largest_group": max(map(len, groups), default=0),
        "groups_across_splits": sum(len(set(films.split[members])) > 1 for members in groups),
        "contradictory_groups": sum(_is_contradictory(films.targets[members]) for members in groups),
        "exact": {"pairs": exact, "across_splits": exact_across},
        "near": {"pairs": pairs - exact, "across_splits": pairs_across - exact_across},
        "listed": _list_pairs(groups, films),
    }


def group_duplicates(
    pixel_hashes: Sequence[str], perceptual_hashes: Sequence[str], thumbnails: np.ndarray
) -> np.ndarray:
    """Put films together that are duplicates of each other.

    Exact duplicates share a pixel hash. Near duplicates are found by perceptual hash and checked by the correlation
    of their thumbnails. Of copies of real films it finds nearly all that were made smaller, re-compressed (down to
    JPEG quality 10), stored in 16 bits, made darker or brighter by a factor, or given a mild gamma (0.8 to 1.3), and
    most of those cropped by 1 % a side or rotated by 1 degree. It misses nearly all copies that are cropped by 2 % a
    side or more or rotated by 2 degrees or more, many that are so bright that much is clipped to white, and all that
    are mirrored or turned to their negative. A film of one grey level is like no other, except exact copies of it.

    All pairs of hashes are compared, in blocks: time grows with the square of the number of films, memory does not.

    Args:
        pixel_hashes: a hash of all pixels, film by film.
        perceptual_hashes: 16 hex digits, as `imagehash.phash` gives, film by film.
        thumbnails: uint8 array (films, P); may be memory-mapped, for only films with similar hashes are read.

    Returns:
        int64 array (films,): the group of each film, which is the index of its first film. If A is like B and B is
        like C, then all three are a group, whether A is like C or not.
    """
    _, first, copy_of = np.unique(pixel_hashes, return_index=True, return_inverse=True)
    group = first[copy_of]
    distinct = np.sort(first)
    signs = _signs([perceptual_hashes[film] for film in distinct])
    for start in range(0, len(distinct), HASHES_PER_BLOCK):
        # The product of two sign vectors is 64 less twice the number of bits that differ.
        close = signs[start : start + HASHES_PER_BLOCK] @ signs[start:].T >= 64 - 2 * MAX_DIFFERENT_BITS
        for i, film in enumerate(distinct[start : start + HASHES_PER_BLOCK]):
            others = distinct[start + i + 1 + np.flatnonzero(close[i, i + 1 :])]
            # Thousands of like films are compared with the first of them only, not with each other.
            others = others[group[others] != group[film]]
            if len(others) == 0:
                continue
            like = others[_correlations(thumbnails, film, others) >= MIN_CORRELATION]
            if len(like):
                joined = np.unique(group[[film, *like]])
                group[np.isin(group, joined)] = joined[0]
    return group


def standardise(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails whose dot products are correlations.

    Args:
        thumbnails: uint8 array (films, P).

    Returns:
        float32 array (films, P), each row of mean 0 and length 1; a film of one grey level becomes zeros.
    """
    centred = thumbnails.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, length, out=centred, where=length > 0)


def _signs(perceptual_hashes: Sequence[str]) -> np.ndarray:
    """float32 array (hashes, 64): -1 for a bit that is 0, 1 for a bit that is 1."""
    octets = np.frombuffer(bytes.fromhex("".join(perceptual_hashes)), dtype=np.uint8)
    return np.unpackbits(octets).reshape(-1, 64).astype(np.float32) * 2 - 1


def _correlations(thumbnails: np.ndarray, film: int, others: np.ndarray) -> np.ndarray:
    standard = standardise(thumbnails[[film]])[0]
    blocks = [others[start : start + THUMBNAILS_PER_BLOCK] for start in range(0, len(others), THUMBNAILS_PER_BLOCK)]
    return np.concatenate([standardise(thumbnails[block]) @ standard for block in blocks])


def _members(group: np.ndarray) -> list[np.ndarray]:
    """The films of each group that has more than one."""
    order = np.argsort(group, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[order])) + 1)
    return [members for members in groups if len(members) > 1]


def _count_pairs(groups: Sequence[np.ndarray], films: FilmTable) -> tuple[int, int]:
    """All pairs within the groups, and those of two splits. Counted, not made: a group may have thousands of films."""
    pairs = same_split = 0
    for members in groups:
        in_split = np.unique(films.split[members], return_counts=True)[1]
        pairs += len(members) * (len(members) - 1) // 2
        same_split += int((in_split * (in_split - 1) // 2).sum())
    return pairs, pairs - same_split


def _is_contradictory(targets: np.ndarray) -> bool:
    return bool(((targets == 1).any(axis=0) & (targets == 0).any(axis=0)).any())


def _list_pairs(groups: Sequence[np.ndarray], films: FilmTable) -> list[dict[str, Any]]:
    pairs = []
    for members in groups:
        chosen: dict[tuple[str, bytes], list[int]] = {}
        for film in members.tolist():
            alike = chosen.setdefault((films.split[film], films.targets[film].tobytes()), [])
            if len(alike) < MAX_PAIRED_FILMS:
                alike.append(film)
        for pair in itertools.combinations(sorted(itertools.chain(*chosen.values())), 2):
            across = films.split[pair[0]] != films.split[pair[1]]
            pairs.append((not across, not _is_contradictory(films.targets[list(pair)]), pair))
    listed = []
    for same_split, agree, (a, b) in sorted(pairs)[:MAX_LISTED_PAIRS]:
        exact = films.pixel_hash[a] == films.pixel_hash[b]
        correlation = 1.0 if exact else round(float(_correlations(films.thumbnails, a, np.array([b]))[0]), 4)
        listed.append(
            {
                "exact": exact,
                "films": [films.describe(a), films.describe(b)],
                "correlation": correlation,
                "across_splits": not same_split,
                "contradictory": not agree,
            }
        )
    return listed
