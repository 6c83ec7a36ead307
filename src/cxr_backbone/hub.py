"""A folder with its card, as one commit on the Hub."""

import json
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from cxr_backbone.evaluation.report import comparison_table, operating_points_table


def check_push_access(repo_id: str | None) -> None:
    """Find out, before anything is trained, whether `push_folder` will be let in.

    Raises:
        ValueError: if the name is missing or malformed, there is no token, the Hub refuses it, or it may not write
            there.
    """
    if repo_id is None:
        raise ValueError("run.push_to_hub needs run.hub_model_id, for example org/cxr-inception.")
    validate_repo_id(repo_id)
    if get_token() is None:
        raise ValueError("run.push_to_hub needs a token of the Hub: run `hf auth login` or set HF_TOKEN.")
    try:
        account = HfApi().whoami()
    except HfHubHTTPError as error:
        raise ValueError(
            f"The Hub refuses this token ({error.response.status_code}); run `hf auth login` again."
        ) from error
    except Exception as error:  # what the HTTP client raises for a lost connection differs from version to version
        raise ValueError(f"The Hub can't be asked about this token: {error}") from error
    namespaces = [account["name"], *[org["name"] for org in account.get("orgs", [])]]
    if "/" in repo_id and repo_id.split("/")[0] not in namespaces:
        raise ValueError(f"This token can't write to {repo_id}; it can write under {', '.join(namespaces)}.")


def write_card(run: Path, model: Path, template: Path, repo_id: str) -> None:
    """Write `README.md` into the folder `model` of a finished run; every number in it comes from the run's files."""
    metrics = json.loads((run / "metrics.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    arguments = yaml.safe_load((run / "config.yaml").read_text())
    config = json.loads((model / "config.json").read_text())
    audit = json.loads((run / "audit.json").read_text())
    data_source = _without_folders(arguments["data"]["source"] or arguments["data"]["format"])
    splits = metrics["models"]["fine_tuned"]["splits"]
    results = [
        EvalResult(
            "image-classification", data_source, data_source, name, round(figure["value"], 4), dataset_split="test"
        )
        for name, figure in splits["test"]["figures"].items()
        if figure["value"] is not None
    ]
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["chest-x-ray", "inception-v3", "medical-imaging"],
        model_name=repo_id,
        eval_results=results,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(template),
        repo_id=repo_id,
        labels=list(config["id2label"].values()),
        multi_label=config["problem_type"] == "multi_label_classification",
        image_size=config["image_size"],
        data_source=data_source,
        init=_without_folders(arguments["model"]["init"] or "random"),
        films_without_patient=audit["patients_across_splits"]["films_without_patient"],
        patients_across_splits=audit["patients_across_splits"]["count"],
        duplicates_across_splits=audit["duplicates"]["groups_across_splits"],
        images={name: split["films"] for name, split in audit["splits"].items()},
        patients=splits["test"]["patients"],
        resamples=metrics["resamples"],
        noise_labels=arguments["data"]["permute_labels"],
        selected_on_test=arguments["data"]["protocol"] == "selected_on_test",
        seconds={name: model["seconds"] for name, model in metrics["models"].items()},
        temperature=config["temperature"],
        perturbed_views=arguments["evaluation"]["perturbed_views"],
        points=sorted({point for points in config["operating_points"].values() for point in points}),
        table=comparison_table(metrics),
        operating_points=operating_points_table(metrics),
        external={
            name.removeprefix("external "): (split["films"], comparison_table(metrics, name))
            for name, split in splits.items()
            if name.startswith("external ")
        },
        **(environment | {"command": " ".join(map(_without_folders, environment["command"]))}),
    )
    card.save(model / "README.md")


def push_folder(folder: Path, repo_id: str) -> str:
    """Upload everything in `folder` as one commit, creating the repository if needed; the URL of the commit."""
    api = HfApi()
    repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
    # Not `upload_folder`: for a large folder that makes several commits, and a reader could meet half a model.
    operations = [
        CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]
    return str(api.create_commit(repo_id, operations, commit_message="Upload CXRInception").commit_url)


def _without_folders(text: str) -> str:
    """The name alone of what is a path on this machine: a card is public. Hub ids stay whole."""
    return Path(text).name if Path(text).is_absolute() or Path(text).exists() else text
