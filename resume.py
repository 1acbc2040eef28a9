"""Going on with a run that was stopped, or repeating one: that one, and no other.

`run` is train.Run, of which `find` sets how far it has come.
"""

import checkpoint
import output_dir
import results
from arguments import OVERRIDABLE, PATHS, read_results
from checkpoint import Position
from errors import InputError
from utils import read_json_lines


def refuse_another_run(run, recorded, source):
    """Raise InputError unless this run is the one that is `recorded`, or --allow_other lets it.

    Returns those of OVERRIDABLE that differ and matter.
    """
    mine, free = run.identity, set(run.args.allow_other)
    different = [name for name in sorted(mine.keys() | recorded.keys())
                 if mine.get(name) != recorded.get(name)]
    kind = {name: "paths" if name in PATHS else name for name in different}
    refused = [f"{name} (then {recorded.get(name)!r:.60}, now {mine.get(name)!r:.60})"
               for name in different if kind[name] not in free]
    if refused:
        raise InputError(f"{source} is of another run: {'; '.join(refused)}. --allow_other can "
                         f"overrule: {', '.join(OVERRIDABLE)}")
    return set(kind.values()) - {"paths"}  # which change no digit


def check_repeat(run):
    """Refuse to repeat what this run cannot: the run of --from_results, as a whole or in part."""
    source, allowed = run.args.from_results, run.args.allow_other
    recorded = read_results(source)
    refuse_another_run(run, results.recorded_identity(recorded), source)
    mixed = [name for name in OVERRIDABLE if name in recorded["overruled"] and name not in allowed]
    if mixed:
        raise InputError(f"{source} is of a run that was resumed with other {' and '.join(mixed)} "
                         f"than it began with: no run repeats it exactly; --allow_other "
                         f"{' '.join(mixed)} repeats its flags")
    run.known_hashes = {name: recorded.get(name) for name in results.MODEL_HASHES}


def refuse_another_model(run, recorded, source):
    """Raise InputError where `source` is of another model than the run of --from_results."""
    for name, sha256 in run.known_hashes.items():
        if recorded.get(name) != sha256:
            raise InputError(f"{source} is of a run with {results.MODEL_HASHES[name]} other than "
                             f"in {run.args.from_results}")


def find(run):
    """Find where to go on -> the results of a run that is finished already, or None."""
    folder = run.args.output_dir
    if (folder / "results.json").exists():
        finished = read_results(folder / "results.json")
        refuse_another_run(run, results.recorded_identity(finished), folder / "results.json")
        refuse_another_model(run, finished, folder / "results.json")
        return finished
    found = checkpoint.newest(run)
    if found is None:
        run.print(f"no whole checkpoint in {folder}: starting from the beginning")
        return None
    state = found.state
    source = f"checkpoint {folder / checkpoint.FOLDER / found.name}"
    run.overruled = refuse_another_run(run, state["identity"], source)
    checkpoint.check_state(run, state)
    refuse_another_model(run, state["hashes"], source)
    run.overruled |= set(state["overruled"])
    run.resumed, run.position, run.rows = found, Position(*state["position"]), state["rows"]
    run.known_hashes, run.files = state["hashes"], state["files"]
    run.seconds |= state["seconds"]
    run.steps = run.position.step + sum(
        stage.steps for stage in run.stages[:run.position.stage])
    run.print(f"resuming at step {run.steps}, after checkpoint {found.name}")
    return None


def prepare_output_dir(run):
    """Clear the run's folder, or bring it back to the checkpoint that it is resumed from."""
    folder = run.args.output_dir
    if run.accelerator.is_main_process:
        if run.resumed is None:
            output_dir.clear(folder)
            checkpoint.drop_leftovers(folder)
        else:
            checkpoint.restore_files(run)
            keep = (*run.files, "adapter/", f"{checkpoint.FOLDER}/", "tracking/")
            output_dir.clear(folder, keep)
    run.accelerator.wait_for_everyone()
    if run.resumed is not None and (folder / "regroup.jsonl").exists():
        run.regroupings = read_json_lines(folder / "regroup.jsonl")
