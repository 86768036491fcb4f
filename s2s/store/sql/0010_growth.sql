-- Growth that is not ours to forbid. docs/faults.rst, "Growth outside our control", says what it is.

-- Notes are written and struck all the time, and a snapshot keeps every one of them. Ids are drawn by one claim at a time,
-- in the order of the commits, so that whoever reads notes starts at the oldest that is left.
alter table batch_notes drop constraint batch_notes_pkey;
alter table batch_notes add column note_id bigint generated always as identity primary key;

-- Every command type that a server of this database has served, with its JSON Schema as JSON's text: jsonb has no
-- character 0, and a pattern may.
create table command_types (
    cmd_type text collate "C" primary key check (length(cmd_type) <= 64 and cmd_type ~ '^[a-z][a-z0-9_.]*$'),
    schema text not null,
    served_at timestamptz not null default now()
);
create trigger command_types_notify after insert or update or delete or truncate on command_types
    for each statement execute function s2s_notify('s2s_command_types');
