"""An audit as one page with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
from PIL import Image

from cxr_backbone.data.audit import INVERTED_BELOW, MAX_BLACK, MAX_WHITE, MIN_RANGE, count_of, leaks
from cxr_backbone.data.duplicates import MIN_CORRELATION
from cxr_backbone.data.facts import THUMBNAIL_SIZE
from cxr_backbone.data.labels import label_names, labels_of
from cxr_backbone.data.metadata_baseline import ALARM_AUROC, ALARM_P

# A picture is about 8 kB, so the page stays near 1.5 MB.
SHOWN_PAIRS = 50
SHOWN_INTENSITIES = 24
SHOWN_FILMS = 60  # on the contact sheet
SHOWN_FILMS_A_CLASS = 6  # and split
SHOWN_PATIENTS = 20


def write_audit_page(report: Mapping[str, Any], data: datasets.DatasetDict, path: str | Path) -> None:
    """Write an audit as one HTML file that needs nothing else: no network, no script.

    It shows films of the data set. Whoever has no right to publish those has none to publish the page.

    Args:
        report: what `audit(data)` returned.
        data: the data set audited, for its thumbnails.
        path: the file to write; one that is there is replaced.

    Raises:
        OSError: the file can't be written.
    """
    page = _PAGE.render(
        report=report,
        leaks=leaks(report),
        pairs=[
            {**pair, "pictures": [_picture(data, film) for film in pair["films"]]}
            for pair in report["duplicates"]["listed"][:SHOWN_PAIRS]
        ],
        num_pairs=report["duplicates"]["exact"]["pairs"] + report["duplicates"]["near"]["pairs"],
        patients=dict(list(report["patients_across_splits"]["listed"].items())[:SHOWN_PATIENTS]),
        intensities=[
            {**film, "picture": _picture(data, film)} for film in report["intensity"]["listed"][:SHOWN_INTENSITIES]
        ],
        contact_sheet=_contact_sheet(data),
    )
    Path(path).write_text(page, encoding="utf-8")


def _contact_sheet(data: datasets.DatasetDict) -> list[dict[str, Any]]:
    """A few films of each class, or with each finding, of each split; evenly spaced, so that all parts of it show."""
    names = label_names(next(iter(data.values())).features)
    each = min(SHOWN_FILMS_A_CLASS, max(1, SHOWN_FILMS // (len(names) * len(data))))
    sheet = []
    for split, films in data.items():
        labels = labels_of(films)
        for index, name in enumerate(names):
            rows = np.flatnonzero(labels == index if labels.ndim == 1 else labels[:, index] == 1)
            spaced = rows[np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(int)]
            described = [{"split": split, "row": row, "image_id": films[row]["image_id"]} for row in spaced.tolist()]
            sheet.append({"split": split, "label": name, "pictures": [_picture(data, film) for film in described]})
    return sheet


def _picture(data: datasets.DatasetDict, film: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of an <img>: the thumbnail as PNG, drawn at the aspect of the film (within 1:2 and 2:1)."""
    facts = data[film["split"]].select_columns("film")[film["row"]]["film"]
    side = THUMBNAIL_SIZE
    png = io.BytesIO()
    Image.frombytes("L", (side, side), facts["thumbnail"]).save(png, "PNG", optimize=True)
    return {
        "src": "data:image/png;base64," + base64.b64encode(png.getvalue()).decode(),
        "alt": film["image_id"],
        "height": side,
        "width": round(side * min(max(facts["width"] / facts["height"], 0.5), 2)),
    }


def _format_p(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


_ENVIRONMENT = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.filters["p"] = _format_p
_ENVIRONMENT.globals.update(
    count_of=count_of,
    MIN_CORRELATION=MIN_CORRELATION,
    ALARM_AUROC=ALARM_AUROC,
    ALARM_P=ALARM_P,
    MIN_RANGE=MIN_RANGE,
    MAX_WHITE=MAX_WHITE,
    MAX_BLACK=MAX_BLACK,
    INVERTED_BELOW=INVERTED_BELOW,
)
_PAGE = _ENVIRONMENT.from_string("""\
{% macro img(picture) %}
<img src="{{ picture.src }}" alt="{{ picture.alt }}" width="{{ picture.width }}" height="{{ picture.height }}">
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Audit of a radiograph data set</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2026; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem } p { margin: .3rem 0 .8rem }
table { border-collapse: collapse } th, td { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }
th { font-weight: 600; border-bottom: 1px solid #b6bcc6 } td.n, th.n { text-align: right; white-space: nowrap }
.wide { overflow-x: auto }
.box { border: 2px solid #2c7a4b; border-radius: 6px; padding: .6rem 1rem; margin: 1rem 0 }
.box h2 { margin-top: 0 } .leak { border-color: #b3261e } .alarm { color: #b3261e; font-weight: 600 }
.bar { background: #e6e9ee; width: 14rem; height: .8rem; margin-top: .3rem }
.bar div { background: #6b7a90; height: 100% } .bar div.over { background: #b3261e }
.films { display: flex; flex-wrap: wrap; gap: 1rem } img { background: #000; margin-right: 2px }
figure { margin: 0; max-width: 26rem } figcaption { font-size: .8rem; overflow-wrap: anywhere }
.across { outline: 2px solid #b3261e; outline-offset: 4px }
footer { margin: 3rem 0 1rem; padding-top: .6rem; border-top: 1px solid #b6bcc6; font-size: .85rem }
</style>
</head>
<body>
<h1>Audit of a radiograph data set</h1>

<div class="box{{ ' leak' if leaks }}">
<h2>Leaks between splits</h2>
<p>A model knows patients and films again. Where they stand in training and in test, it looks better than it is.</p>
{% for sentence in leaks.values() %}
<p class="alarm">{{ sentence }}</p>
{% else %}
<p><strong>None found.</strong></p>
{% endfor %}
{% set unknown = report.patients_across_splits.films_without_patient %}
{% if unknown %}
<p>Patients unknown: {{ count_of(unknown, "film") }} without a patient_id. Such a patient may be in two splits.</p>
{% endif %}
</div>

<h2>Films, patients and labels</h2>
<p>Splits should hold the same labels in like shares, unless they were collected apart.</p>
<div class="wide"><table>
<tr><th>split</th><th class="n">films</th><th class="n">patients</th>
{% for label in (report.splits.values() | first).labels %}<th class="n">{{ label }}</th>{% endfor %}</tr>
{% for name, split in report.splits.items() %}
<tr><td>{{ name }}</td><td class="n">{{ "{:,}".format(split.films) }}</td>
<td class="n">{{ "unknown" if split.patients is none else "{:,}".format(split.patients) }}</td>
{% for count in split.labels.values() %}<td class="n">{{ "{:,}".format(count) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% set sizes = report.sizes %}
<p>Heights {{ sizes.height[0] }} to {{ sizes.height[1] }} pixels, widths {{ sizes.width[0] }} to {{ sizes.width[1] }};
{{ count_of(sizes.most_frequent.films, "film") }} of height {{ sizes.most_frequent.height }} and width
{{ sizes.most_frequent.width }}.</p>

{% if patients %}
<h2>Patients in more than one split</h2>
<p>Split by patient, never by film.</p>
<div class="wide"><table>
<tr><th>patient_id</th>{% for name in report.splits %}<th class="n">films in {{ name }}</th>{% endfor %}</tr>
{% for patient, films in patients.items() %}
<tr><td>{{ patient }}</td>
{% for name in report.splits %}<td class="n">{{ films[name] | default(0) }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% if report.patients_across_splits.count > patients | length %}
<p>{{ count_of(report.patients_across_splits.count - patients | length, "more patient") }} not shown.</p>
{% endif %}
{% endif %}

{% set duplicates = report.duplicates %}
<h2>Duplicates</h2>
<p>A film that is there twice counts twice; with two labels, one of them is wrong. Exact duplicates have the same
pixels, near duplicates thumbnails that correlate by {{ MIN_CORRELATION }} or more.</p>
<p>{% for kind, found in [("exact", duplicates.exact), ("near", duplicates.near)] %}
{{ count_of(found.pairs, kind ~ " pair") }} ({{ "{:,}".format(found.across_splits) }} across splits)
{%- if loop.first %} and {% endif %}
{% endfor %}
{%- if duplicates.groups %}, in {{ count_of(duplicates.groups, "group") }}, the largest of
{{ count_of(duplicates.largest_group, "film") }}, {{ "{:,}".format(duplicates.contradictory_groups) }} with
contradictory labels{% endif %}.</p>
<div class="films">
{% for pair in pairs %}
<figure{% if pair.across_splits %} class="across"{% endif %}>
{% for picture in pair.pictures %}{{ img(picture) }}{% endfor %}
<figcaption>{{ "exact" if pair.exact else "near" }}, correlation {{ "%.4f" | format(pair.correlation) }}
{%- if pair.across_splits %}, <span class="alarm">across splits</span>{% endif %}
{%- if pair.contradictory %}, <span class="alarm">contradictory labels</span>{% endif %}
{% for film in pair.films %}<br>{{ film.split }}: {{ film.image_id }} ({{ film.label }}){% endfor %}</figcaption>
</figure>
{% endfor %}
</div>
{% if num_pairs > pairs | length %}
<p>{{ count_of(num_pairs - pairs | length, "more pair") }} not shown.</p>
{% endif %}

<h2>What metadata alone tells</h2>
<p>These facts say nothing of a disease, so none of them should tell the label; a network can learn what does. It sees
size and aspect by the way a film is resized, file size by compression and texture. AUROC on the train split, 0.5 is
chance; the alarm is at {{ ALARM_AUROC }} or more with p below {{ ALARM_P }}.</p>
{% set baseline = report.metadata_baseline %}
{% if baseline.facts %}
<div class="wide"><table>
<tr><th>fact</th><th>label</th><th class="n">AUROC</th><th></th><th class="n">p</th></tr>
{% for fact, result in baseline.facts.items() %}
{% set over = fact in baseline.alarm %}
<tr><td>{{ "all together" if fact == "combined" else fact }}</td><td>{{ result.label }}</td>
<td class="n{{ ' alarm' if over }}">{{ "%.3f" | format(result.auroc) }}</td>
<td><div class="bar"><div{% if over %} class="over"{% endif %} style="width:
{{- [0, 200 * (result.auroc - 0.5)] | max | round | int }}%"></div></div></td>
<td class="n">{{ result.p | p }}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p>Not tried: no label of the train split has films with and without it.</p>
{% endif %}

<h2>Grey range</h2>
<p>Films that may have been read wrongly: nearly constant (98 % of the pixels within {{ MIN_RANGE }} grey levels),
mostly white (over {{ "%.0f" | format(100 * MAX_WHITE) }} % of the pixels), mostly black (over
{{ "%.0f" | format(100 * MAX_BLACK) }} %), probably inverted (correlation with the mean film below
{{ INVERTED_BELOW }}).</p>
{% for reason, count in report.intensity.counts.items() %}
<p class="alarm">{{ count_of(count, "film") }} {{ reason }}</p>
{% else %}
<p><strong>None found.</strong></p>
{% endfor %}
<div class="films">
{% for film in intensities %}
<figure>{{ img(film.picture) }}
<figcaption>{{ film.reasons | join(", ") }}
{% if film.correlation is not none %}<br>correlation {{ "%.2f" | format(film.correlation) }}{% endif %}
<br>{{ film.split }}: {{ film.image_id }} ({{ film.label }})</figcaption></figure>
{% endfor %}
</div>

<h2>Unreadable files</h2>
<p>Left out of the data set, and of everything above.</p>
{% if report.unreadable %}
<ul>
{% for path, reason in report.unreadable.items() %}<li>{{ path }}: {{ reason }}</li>{% endfor %}
</ul>
{% else %}
<p><strong>None.</strong></p>
{% endif %}

<h2>Contact sheet</h2>
<p>A few films of each split and label, at the aspect of their file.</p>
{% for row in contact_sheet if row.pictures %}
<p>{{ row.split }}, {{ row.label }}</p>
<div>{% for picture in row.pictures %}{{ img(picture) }}{% endfor %}</div>
{% endfor %}

<footer>This page shows films of the data set and names its patients by their patient_id. Do not publish or pass it on
unless you may publish the films.</footer>
</body>
</html>
""")
