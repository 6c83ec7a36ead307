"""Drawn chest phantoms: a built-in sample to try every step on, without a download and without a patient."""

from __future__ import annotations

import io

import datasets
import numpy as np
from PIL import Image

from cxr_backbone.data.labels import make_features

LABELS = ["NORMAL", "PNEUMONIA"]
SPLIT_SHARES = {"train": 0.70, "validation": 0.15}  # test takes the rest
MIN_PATIENTS = 20
MIN_IMAGE_SIZE = 32


def load_synthetic(num_patients: int = 300, *, image_size: int = 150, seed: int = 0) -> datasets.DatasetDict:
    """Draw a data set of phantoms with the columns and splits of the Kermany set.

    Every second patient has opacities. A patient has one film or two, of the same anatomy under another
    exposure; patients are split 70 / 15 / 15.

    Args:
        num_patients: at least 20.
        image_size: side of the square films, in pixels.
        seed: the same arguments draw the same films.

    Returns:
        Splits train, validation and test with the columns of `labels.make_features` (PNG bytes; NORMAL 0,
        PNEUMONIA 1) and subtype ("normal", or "drawn" for an opacity).

    Raises:
        ValueError: fewer than 20 patients, or an image_size or seed out of range.
    """
    if num_patients < MIN_PATIENTS:
        raise ValueError(f"num_patients must be at least {MIN_PATIENTS}, not {num_patients}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}.")
    features = datasets.Features({**make_features(LABELS), "subtype": datasets.Value("string")})
    # Neighbouring data set seeds share no phantom.
    phantom_seeds = np.random.SeedSequence(seed).generate_state(num_patients)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for patient, phantom_seed in enumerate(phantom_seeds):
        split = _split_of(patient / num_patients)
        label = patient % 2
        for film in range(1 + phantom_seed % 2):
            pixels = draw_phantom(int(phantom_seed), opacity=bool(label), image_size=image_size, film=film)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            patient_id = f"phantom{patient}"
            image_id = f"{patient_id}_{film}.png"
            rows[split].append(
                {
                    "image": {"bytes": png.getvalue(), "path": image_id},
                    "label": label,
                    "patient_id": patient_id,
                    "image_id": image_id,
                    "subtype": "drawn" if label else "normal",
                }
            )
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(films, features=features) for split, films in rows.items()}
    )


def draw_phantom(seed: int, *, opacity: bool, image_size: int = 299, film: int = 0) -> np.ndarray:
    """Draw a frontal chest film: body, lungs, heart, spine, ribs, clavicles, vessels and noise.

    An opacity is two to four soft, mottled patches inside one lung. Exposure and contrast vary from film to
    film, so brightness alone tells little about the label.

    Args:
        seed: chooses the anatomy and the patches; the same arguments give the same pixels.
        opacity: whether to draw patches. It changes nothing else.
        image_size: side S in pixels, at least 32.
        film: number of the film of this anatomy; it chooses position, exposure and noise.

    Returns:
        uint8 array (S, S), bone white, air black.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {MIN_IMAGE_SIZE} pixels, not {image_size}.")
    if seed < 0 or film < 0:
        raise ValueError(f"seed and film must not be negative, but are {seed} and {film}.")
    anatomy = np.random.default_rng([seed, 0])
    patches = np.random.default_rng([seed, 1])
    exposure = np.random.default_rng([seed, 2, film])

    x, y = _film_coordinates(exposure, image_size)
    attenuation, lungs = _draw_anatomy(anatomy, x, y)
    if opacity:
        attenuation += _draw_patches(patches, x, y, lungs)
    return _expose(exposure, attenuation)


def _split_of(position: float) -> str:
    """The split of a patient, by position in [0, 1) among all patients."""
    if position < SPLIT_SHARES["train"]:
        return "train"
    return "validation" if position < SPLIT_SHARES["train"] + SPLIT_SHARES["validation"] else "test"


def _film_coordinates(exposure: np.random.Generator, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Body coordinates of each pixel: x from -1 (left of the picture) to 1, y from -1 (top) to 1."""
    v, u = np.mgrid[-1 : 1 : image_size * 1j, -1 : 1 : image_size * 1j]
    angle, zoom = exposure.normal(0, 0.04), exposure.uniform(0.92, 1.08)
    x = zoom * (np.cos(angle) * u - np.sin(angle) * v) + exposure.normal(0, 0.04)
    y = zoom * (np.sin(angle) * u + np.cos(angle) * v) + exposure.normal(0, 0.04)
    return x, y


def _draw_anatomy(anatomy: np.random.Generator, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attenuation (0 air to about 1.5 spine behind the heart) and how much of each pixel is lung (0 to 1)."""

    def vary(value: float, spread: float = 0.06) -> float:
        return value * anatomy.uniform(1 - spread, 1 + spread)

    # Body: a trunk that narrows to the neck over sloping shoulders.
    half_width = vary(0.93) - 0.66 * _step(-0.74 - y, 0.07)
    body = _step(half_width - np.abs(x), 0.03)
    attenuation = vary(0.62) * body

    # Lungs: tall eggs, narrow at the apex, cut off below by the domes of the diaphragm.
    lung_x, lung_width, lung_top = vary(0.42), vary(0.36), vary(0.76)
    lungs = np.zeros_like(x)
    for side in (-1, 1):
        base = vary(0.62, 0.1) + 0.05 * side
        height = np.clip((y + lung_top) / (base + lung_top), 0, 1.3)
        width = lung_width * np.clip(height, 0, 1) ** 0.42
        across = side * x - lung_x + 0.07 * (1 - height)
        dome = base + 0.9 * (across - 0.02) ** 2 - 0.02
        lungs += _step(width - np.abs(across), 0.035) * _step(dome - y, 0.025) * _step(y + lung_top, 0.03)
    attenuation -= vary(0.46, 0.1) * lungs

    # Mediastinum and heart, two thirds of it right of the midline in the picture, take the lung's place.
    heart_width, heart_height = vary(0.36, 0.15), vary(0.30, 0.1)
    from_heart_x, from_heart_y = x - vary(0.10, 0.3), y - vary(0.40)
    along, across = 0.88 * from_heart_x + 0.47 * from_heart_y, 0.88 * from_heart_y - 0.47 * from_heart_x
    heart = _step(1 - np.hypot(along / heart_width, across / heart_height), 0.25)
    half_mediastinum = vary(0.13, 0.2) + 0.03 * np.cos(6 * y)
    mediastinum = _step(half_mediastinum - np.abs(x - 0.02), 0.03) * _step(0.5 - y, 0.1)
    centre = np.maximum(heart, mediastinum)
    attenuation += 0.36 * centre * lungs
    lungs = lungs * (1 - centre)

    # Lung markings: fine texture, densest around the hila.
    hila = sum(np.exp(-(((x - side * 0.2) / 0.2) ** 2) - ((y - 0.02) / 0.3) ** 2) for side in (-1, 1))
    strands = np.abs(_cloud(anatomy, x.shape, cells=14)) + 0.6 * np.abs(_cloud(anatomy, x.shape, cells=28))
    attenuation += lungs * (0.03 + vary(0.09, 0.5) * hila) * np.maximum(1.9 - strands, 0)

    # Spine: a column with darker discs, faint behind the heart.
    spine = _step(vary(0.08) - np.abs(x), 0.05) * (0.8 + 0.2 * np.cos(2 * np.pi * y / vary(0.19)))
    attenuation += vary(0.14) * spine

    # Ribs: arcs that fall away from the spine, brightest at their edge; clavicles above them.
    pitch, slope = vary(0.165), vary(0.32, 0.2)
    chest = _step(0.86 * half_width - np.abs(x), 0.03) * _step(y + 0.78, 0.04) * _step(0.74 - y, 0.1)
    fall = slope * np.abs(x) ** 1.6 - 0.12 * np.exp(-((x / 0.2) ** 2))
    phase = (y - fall + anatomy.uniform(0, pitch)) / pitch
    across_rib = np.abs(phase - np.round(phase)) * pitch
    ribs = _step(0.032 - across_rib, 0.008) * (0.7 + 0.3 * _step(across_rib - 0.018, 0.008))
    attenuation += vary(0.10, 0.2) * ribs * chest * _step(np.abs(x) - 0.07, 0.03) * (0.35 + 0.65 * lungs)
    along = np.abs(np.abs(x) - 0.40) / 0.34
    clavicles = _step(0.03 - np.abs(y + vary(0.66) + 0.16 * (np.abs(x) - 0.2)), 0.01) * _step(1 - along, 0.05)
    attenuation += vary(0.14) * clavicles * body

    # Soft tissue of the chest wall over the lower lungs, another in every patient: a haze that is no opacity.
    for side in (-1, 1):
        wall = np.exp(-(((x - side * 0.5) / 0.4) ** 2) - ((y - 0.5) / 0.3) ** 2)
        attenuation += anatomy.uniform(0, 0.10) * wall
    return attenuation, lungs


def _draw_patches(patches: np.random.Generator, x: np.ndarray, y: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """Added attenuation of two to four mottled patches in one lung, close together."""
    side = patches.choice([-1, 1])
    inside = np.argwhere((lungs > 0.98) & (side * x > 0.25) & (y > -0.4))
    row, column = inside[patches.integers(len(inside))]
    ragged = np.clip(1 + 0.25 * _cloud(patches, x.shape, cells=12), 0.6, 1.6)
    mottled = np.clip(1 + 0.3 * _cloud(patches, x.shape, cells=30), 0.4, 1.6)
    total = np.zeros_like(x)
    for _ in range(patches.integers(2, 5)):
        centre_x = x[row, column] + patches.normal(0, 0.07)
        centre_y = y[row, column] + patches.normal(0, 0.12)
        radius_x, radius_y = patches.uniform(0.12, 0.22, size=2)
        distance = np.hypot((x - centre_x) / radius_x, (y - centre_y) / radius_y)
        total = np.maximum(total, np.exp(-((distance * ragged) ** 3)))
    return patches.uniform(0.26, 0.42) * total * mottled * lungs


def _expose(exposure: np.random.Generator, attenuation: np.ndarray) -> np.ndarray:
    """Scatter, noise, window and gamma: attenuation to uint8, differently for every exposure."""
    noisy = attenuation + 0.012 * _cloud(exposure, attenuation.shape, cells=5)
    noisy += exposure.normal(0, exposure.uniform(0.012, 0.03), attenuation.shape)
    black, white = exposure.uniform(-0.08, 0.06), exposure.uniform(0.9, 1.15)
    scaled = np.clip((noisy - black) / (white - black), 0, 1) ** exposure.uniform(0.75, 1.35)
    return np.round(255 * scaled).astype(np.uint8)


def _step(distance: np.ndarray, softness: float) -> np.ndarray:
    """1 inside (distance above 0), 0 outside, with a soft edge."""
    return 1 / (1 + np.exp(-np.clip(4 * distance / softness, -30, 30)))


def _cloud(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """Smooth noise of unit spread, `cells` bumps across the picture, the same at every picture size."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    height, width = shape
    return np.asarray(coarse.resize((width, height), resample=Image.Resampling.BICUBIC), dtype=np.float64)
