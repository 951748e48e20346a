"""`cluster:` takes what a site wants, and no value of a secret: it would be written into every script."""

from __future__ import annotations

import pytest

from mcore_longctx.errors import ConfigError
from mcore_longctx.recipe import ClusterSection
from mcore_longctx.recipe.load import open_recipe

PLANTED = "abc123planted"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"cluster.setup=['export WANDB_API_KEY={PLANTED}']", "setup[0]: WANDB_API_KEY looks like a secret"),
        (f"cluster.setup=[module load cuda, 'HF_TOKEN=\"{PLANTED}\" python x']", "setup[1]: HF_TOKEN looks like a secret"),
        (f"cluster.setup=['login --password={PLANTED}']", "setup[0]: password looks like a secret"),
        (f"cluster.sbatch=['--export=ALL,HF_TOKEN={PLANTED}']", "sbatch[0]: HF_TOKEN looks like a secret"),
        (f"cluster.sbatch=[--mail-type=END, '--export HF_TOKEN={PLANTED}']", "sbatch[1]: HF_TOKEN looks like a secret"),
        *(
            (f"cluster.environment={{{name}: {PLANTED}}}", f"environment.{name} looks like a secret")
            for name in ("MY_PASSWD", "GITHUB_PAT", "DB_PASS", "PROXY_AUTH", "db_password", "X_CREDENTIALS")
        ),
    ],
)
def test_a_value_that_looks_like_a_secret_is_refused_and_not_printed(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_recipe("tiny-cpu", [override])
    assert words in str(refused.value)
    assert "list its name in cluster.secrets" in str(refused.value)
    assert "\n" not in str(refused.value)
    if "environment" not in override:
        assert PLANTED not in str(refused.value).replace(override, "")


def test_what_is_looked_up_when_the_job_runs_is_no_value() -> None:
    setup = (
        'export HF_TOKEN="$(cat ~/.hf)"',
        "export WANDB_API_KEY=$MY_KEY",
        "export WANDB_API_KEY=`cat key`",
        "unset_me_TOKEN= run",
        "export HF_TOKEN",
        ': "${HF_TOKEN:?}"',
        "export LD_LIBRARY_PATH=/opt/lib",
        "export TOKENIZERS_PARALLELISM=false",
        "export GIT_AUTHOR_NAME=me XAUTHORITY=/x",
        "source venv/bin/activate",
    )
    sbatch = ("--export=ALL,HF_TOKEN", "--wckey=project", "--mail-type=END", "-C gold")
    environment = {"TOKENIZERS_PARALLELISM": "false", "COMPASS": "1", "DATA_PATH": "/x", "GIT_AUTHOR_NAME": "me"}
    assert ClusterSection(setup=setup, sbatch=sbatch, environment=environment).setup == setup
