"""Make and check a repository that can be entered in a contest; docs/tournament.md shows all steps.

LICENSE and NOTICE must be upstream's, line for line: name the files of upstream's repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from podium.arguments import examples
from podium.entry.build import EntryOptions, build
from podium.entry.objections import as_json, objections
from shared.errors import SettingsError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `entry` to the command line."""
    parser = subparsers.add_parser(
        "entry",
        help="make and check a repository for a contest",
        description=__doc__,
        epilog=examples(
            "podium entry build ../entry --license ../upstream/LICENSE.md --notice ../upstream/NOTICE",
            "podium entry check ../entry --license ../upstream/LICENSE.md --notice ../upstream/NOTICE",
        ),
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = actions.add_parser(
        "build",
        help="write an entry into a folder",
        epilog=examples(
            "podium entry build ../entry --license LICENSE.md --notice NOTICE",
            "podium entry build ../entry --license LICENSE.md --notice NOTICE --profiles 'auto lora_r128'",
        ),
    )
    made.add_argument("folder", type=Path, metavar="DIR", help="new, empty, or an earlier entry")
    made.add_argument("--license", type=Path, required=True, metavar="FILE", help="upstream's LICENSE")
    made.add_argument("--notice", type=Path, required=True, metavar="FILE", help="upstream's NOTICE")
    usual = EntryOptions(license=Path(), notice=Path())
    made.add_argument(
        "--profiles",
        default=" ".join(usual.profiles),
        help="to train with: the first that can be carried out (default: %(default)s)",
    )
    made.add_argument("--base-image", default=usual.base_image, help="default: %(default)s")
    made.add_argument("--torch-args", default="", help="pip arguments for torch alone, such as an index")
    made.set_defaults(run=run_build)
    checked = actions.add_parser(
        "check",
        help="name what a validator would object to",
        epilog=examples("podium entry check ../entry --license LICENSE.md --notice NOTICE"),
    )
    checked.add_argument("folder", type=Path, metavar="DIR")
    checked.add_argument("--license", type=Path, metavar="FILE", help="upstream's, to compare with")
    checked.add_argument("--notice", type=Path, metavar="FILE", help="upstream's, to compare with")
    checked.set_defaults(run=run_check)


def run_build(args: argparse.Namespace) -> int:
    """Write an entry and say what to do next."""
    profiles = tuple(args.profiles.split())
    if not profiles:
        raise SettingsError("--profiles names no profile")
    options = EntryOptions(
        license=args.license,
        notice=args.notice,
        profiles=profiles,
        torch_args=args.torch_args,
        base_image=args.base_image,
    )
    files = build(args.folder, options)
    size = sum((args.folder / path).stat().st_size for path in files)
    print(f"{len(files)} files, {size} bytes in {args.folder}")
    print("next     git init, git add, git commit; then `podium entry check`")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Print every objection and what to do; exit code 1 if there is one."""
    if not args.folder.is_dir():
        raise SettingsError(f"no folder {args.folder}")
    for option, path in (("--license", args.license), ("--notice", args.notice)):
        if path is not None and not path.is_file():
            raise SettingsError(f"{option}: no file {path}")
    found = objections(args.folder, args.license, args.notice)
    for one in found:
        print(f"{one.what}\n         {one.advice}")
    if args.license is None or args.notice is None:
        print("LICENSE and NOTICE were not compared: name upstream's with --license and --notice")
    print(as_json(found))
    return 1 if found else 0
