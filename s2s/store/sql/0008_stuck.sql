-- A batch whose handler does not return. Its process lives and has charged its commands: no other process may take them
-- while the note stands, and the end of the process charges nothing more.
alter table batch_notes add column stuck boolean not null default false;
