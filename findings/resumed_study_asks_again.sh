#!/usr/bin/env bash
# optuna 5.0.0: a seeded study that is gone on with asks for the points that it has already.
#
# The guess: with create_study(load_if_exists=True) and a sampler of the same seed, a study goes on where it ended: the
#   sampler is given the trials that are in the storage, and its own random numbers go on behind those of these trials.
# What happens: the sampler's numbers begin at the seed again. While its startup lasts (10 trials) TPE asks for exactly the
#   points of the first trials, in their order; nothing warns, and each is run again.
# Seen (optuna 5.0.0): after 4 trials and 4 more in a second process's study, 4 distinct points. RandomSampler does the same.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet optuna==5.0.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)
found = {}
for kind in (optuna.samplers.TPESampler, optuna.samplers.RandomSampler):
    for _ in range(2):  # the second time as a resumed process would
        study = optuna.create_study(
            study_name=kind.__name__, storage=JournalStorage(JournalFileBackend("journal.log")),
            load_if_exists=True, sampler=kind(seed=0),
        )
        study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=4)
    found[kind.__name__] = len(study.trials), len({trial.params["x"] for trial in study.trials})
print(optuna.__version__, found)
assert optuna.__version__ == "5.0.0"
assert found == {"TPESampler": (8, 4), "RandomSampler": (8, 4)}, "this changed"
PY
