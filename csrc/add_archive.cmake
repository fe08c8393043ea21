# Adds the members of archive PART to ARCHIVE, by ar's script, which every version of it reads.
file(WRITE ${ARCHIVE}.ar "open ${ARCHIVE}\naddlib ${PART}\nsave\nend\n")
execute_process(COMMAND ${AR} -M INPUT_FILE ${ARCHIVE}.ar COMMAND_ERROR_IS_FATAL ANY)
file(REMOVE ${ARCHIVE}.ar)
