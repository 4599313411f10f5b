#!/bin/sh
# Obeys lines on a console: agent ttyS0. A line is "ID COMMAND"; the answer is a line "agent: begin ID", the
# command's output, and "agent: end ID STATUS" on a line of its own. tests/harness/agent.py is the other end.
exec < "/dev/$1" > "/dev/$1" 2>&1
# Carriage returns still become line feeds, so that a person can type here, too.
stty raw -echo icrnl
printf '\nagent: ready on %s, Linux %s\n' "$1" "$(uname -r)"
while read -r id command; do
    [ -n "$command" ] || continue
    printf '\nagent: begin %s\n' "$id"
    (eval "$command") < /dev/null
    printf '\nagent: end %s %s\n' "$id" "$?"
done
