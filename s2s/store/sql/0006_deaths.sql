-- Charges for the end of a process, among all charges of a command: a command that stood in a batch with a killer is not
-- to die of it. docs/protocol.rst, "Commands", says how many of which are the last.
alter table commands add column deaths integer not null default 0;
