"""The script that completes the commands in bash and zsh, made from the apps."""

from completions.commands import ROOMS, commands, options, values

_HEAD = """\
# Completes granary's commands in bash (3.2 or newer) and zsh: python -m train --ar<TAB>.
# Made by `python -m completions`; make it again after an update. docs/shell.md says how to install it.
if [ -n "${ZSH_VERSION-}" ]; then
    autoload -U +X compinit bashcompinit
    whence compdef >/dev/null || compinit
    bashcompinit
elif [ -z "${_granary_before-}" ]; then
    # What completed python before goes on completing everything that is not ours.
    if declare -F _comp_load >/dev/null; then _comp_load python
    elif declare -F _completion_loader >/dev/null; then _completion_loader python
    fi
    _granary_before=$(complete -p python 2>/dev/null | sed -n 's/.* -F \\([^ ]*\\) .*/\\1/p')
fi
"""
_BODY = """\
_granary_reply() {  # the words of $1 that begin as $2 does; in a list with commas, as what is after the last one does
    local last="${2##*,}" word
    for word in $1; do
        case "$word" in
            "$last"*) COMPREPLY+=("${2%"$last"}$word") ;;
        esac
    done
}

_granary_else() {  # what completed python before
    [ -z "${_granary_before-}" ] || "$_granary_before" "$@"
}

_granary() {
    [ -z "${ZSH_VERSION-}" ] || emulate -L ksh  # arrays from 0, words split
    local current="${COMP_WORDS[COMP_CWORD]}" option="${COMP_WORDS[COMP_CWORD-1]}" at=1 room= command= known=
    COMPREPLY=()
    while [ "$at" -lt "$COMP_CWORD" ] && [ "${COMP_WORDS[$at]}" != -m ]; do at=$((at + 1)); done
    if [ "$COMP_CWORD" -eq "$((at + 1))" ]; then
        _granary_reply "@ROOMS@" "$current"
        [ "${#COMPREPLY[@]}" -gt 0 ] || _granary_else "$@"
        return
    fi
    [ "$COMP_CWORD" -le "$at" ] || room="${COMP_WORDS[$at+1]}"
    known=" $(_granary_known "$room") " command="$room"
    if [ "$known" = "  " ]; then _granary_else "$@"; return; fi
    if [ "$COMP_CWORD" -gt "$((at + 2))" ]; then
        case "$known" in
            *" ${COMP_WORDS[$at+2]} "*) command="$room ${COMP_WORDS[$at+2]}" ;;
        esac
    fi
    if [ "$option" = "=" ]; then option="${COMP_WORDS[COMP_CWORD-2]}"; fi
    case "$current" in
        -*) _granary_reply "$(_granary_options "$command")" "$current" ;;
        =) _granary_reply "$(_granary_values "$command $option")" "" ;;
        *)
            if [ "$COMP_CWORD" -eq "$((at + 2))" ]; then _granary_reply "${known# + }" "$current"
            else _granary_reply "$(_granary_values "$command $option")" "$current"
            fi ;;
    esac  # without a match the shell completes the names of files
}

complete -o default -F _granary python python3 .venv/bin/python
"""


def script() -> str:
    """The whole script, for both shells."""
    found = commands()
    below = {room: [name.split(" ")[1] for name in found if name.startswith(f"{room} ")] for room in ROOMS}
    taken = {
        f"{name} {option}": names for name, command in found.items() for option, names in values(name, command).items()
    }
    parts = [
        _HEAD,
        _function(
            "_granary_known",
            "the commands of a room, or a plus where it is one itself",
            {room: [*names] or ["+"] for room, names in below.items()},
        ),
        _function("_granary_options", "of a command", {name: options(command) for name, command in found.items()}),
        _function("_granary_values", "the names that an option of a command takes", taken),
        _BODY.replace("@ROOMS@", " ".join(ROOMS)),
    ]
    return "\n".join(parts)


def _function(name: str, what: str, table: dict[str, list[str]]) -> str:
    cases = "\n".join(f'        "{key}") printf "%s\\n" "{" ".join(words)}" ;;' for key, words in table.items())
    return f'{name}() {{  # {what}\n    case "$1" in\n{cases}\n    esac\n}}\n'
